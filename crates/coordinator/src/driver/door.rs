//! Validates what workers hand in against the job. Anything accepted here is journaled, trained on and replayed after
//! every restart. So it is checked on submission, and again when a journal of an earlier version is read.

use pacs_protocol::{ANSWER_BYTES, MOST_VERDICT_TEXT, WireError, v1};
use pacs_shape::{ModelConfig, RouteShape};
use pacs_spec::{JobSpec, VerifierKind, VerifierSpec};
use pacs_types::{MAX_SAMPLE_BYTES, Purpose, Sample, Verdict, VersionSpan, WeightVersion};
use tonic::Status;

/// Upper bound on the text of a token: the longest known tokens are runs of 512 blanks, and
/// invalid bytes become three each.
const TEXT_BYTES_PER_TOKEN: usize = 4096;
/// Upper bound on a token with its two log-probs and its span in a message.
const BYTES_PER_TOKEN: usize = 5 + 4 + 4 + 16;
/// Allowance for the rest of a sample and of the call that hands it in.
const CALL_BYTES: usize = 4096;
/// Largest absolute reward of one verifier (docs/VERIFIERS.md).
const MOST_VERIFIER_REWARD: f64 = 1e6;
/// Factor by which a sum of rounded numbers may exceed its bound.
const ROUNDING: f64 = 1.01;

/// Limits that the job sets for samples and verdicts.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    /// Rows of the model's embedding; `None` if its configuration cannot be read.
    vocabulary: Option<u32>,
    /// How samples that are trained on record their experts; `None` where they do not.
    routes: Option<RouteShape>,
    max_prompt_tokens: usize,
    max_new_tokens: u32,
    /// Kind of the built-in verifier, whose labels are 0 or 1; `None` for others.
    built_in: Option<&'static str>,
    most_reward: f64,
    /// The verifiers of the job, each with its largest reward.
    verifiers: Vec<(String, f64)>,
}

impl Door {
    pub(crate) fn new(spec: &JobSpec, model: Option<&ModelConfig>, routes: Option<RouteShape>) -> Self {
        let most = |kind: VerifierKind| if kind.is_built_in() { 1.0 } else { MOST_VERIFIER_REWARD };
        let reward = &spec.reward;
        // Evaluation sets may have their own verifiers, which return a label and nothing else. Problems may name one, which gives
        // the label in place of the job's.
        let named = spec.named_verifiers();
        let resolved = spec.all_evaluation_sets().filter_map(|set| set.verifier).map(|verifier| verifier.kind);
        let kinds: Vec<VerifierKind> = resolved.chain(named.iter().map(|(_, verifier)| verifier.kind)).collect();
        let sets = || kinds.iter().copied();
        let most_of_sets = sets().map(most).fold(0.0, f64::max);
        let most_label = most(spec.verifier.kind).max(most_of_sets);
        let label = (VerifierSpec::LABEL.to_owned(), most_label);
        let more = reward.verifiers.iter().map(|(name, verifier)| (name.clone(), most(verifier.kind)));
        let most_named = named.iter().map(|(name, verifier)| (name.clone(), most(verifier.kind)));
        let weights = [reward.weight].into_iter().chain(reward.verifiers.values().map(|verifier| verifier.weight));
        let mut verifiers: Vec<_> = [label].into_iter().chain(more).collect();
        let weighted: f64 = weights.zip(&verifiers).map(|(weight, (_, most))| weight.abs() * most).sum();
        let most_reward = (weighted + reward.format_bonus.abs() + reward.overlong_penalty).max(most_of_sets) * ROUNDING;
        verifiers.extend(most_named);
        Self {
            vocabulary: model.and_then(|model| u32::try_from(model.vocab_size).ok()),
            routes,
            max_prompt_tokens: spec.data.max_prompt_tokens,
            max_new_tokens: spec.rollout.max_new_tokens,
            built_in: sets()
                .chain([spec.verifier.kind])
                .all(VerifierKind::is_built_in)
                .then(|| spec.verifier.kind.name()),
            most_reward,
            verifiers,
        }
    }

    /// Upper bound on the size of a call that hands in a sample of this job.
    pub(crate) fn sample_bytes(&self) -> usize {
        let of_tokens =
            BYTES_PER_TOKEN.saturating_add(TEXT_BYTES_PER_TOKEN).saturating_mul(self.max_new_tokens as usize);
        let tokens = self.max_prompt_tokens.saturating_add(self.max_new_tokens as usize);
        let of_tokens = of_tokens.saturating_add(tokens.saturating_mul(self.route_bytes()));
        of_tokens.min(MAX_SAMPLE_BYTES + ANSWER_BYTES - CALL_BYTES) + CALL_BYTES
    }

    /// Bytes of the routes of one token; 0 where none are recorded.
    pub(crate) fn route_bytes(&self) -> usize {
        self.routes.map_or(0, |shape| shape.token_bytes())
    }

    /// Checks a sample against the job: number of tokens, their vocabulary, and the experts that they name. How many tokens its routes
    /// must cover depends on its prompt ([`Self::route_count`]).
    pub(crate) fn sample(&self, sample: &Sample, purpose: Purpose) -> Result<(), WireError> {
        let (tokens, most) = (sample.tokens.len(), self.max_new_tokens);
        if tokens > most as usize {
            let problem = format!("has {tokens} values, and the lease allows {most} (`rollout.max_new_tokens`)");
            return Err(WireError::new("tokens", problem));
        }
        if let Some(vocabulary) = self.vocabulary
            && let Some(token) = sample.tokens.iter().find(|token| **token >= vocabulary)
        {
            let problem = format!("holds {token}, and the model's vocabulary has {vocabulary} tokens");
            return Err(WireError::new("tokens", problem));
        }
        let bytes = sample.text.len();
        if bytes > TEXT_BYTES_PER_TOKEN.saturating_mul(tokens) {
            let problem =
                format!("has {bytes} bytes for {tokens} tokens, expected at most {TEXT_BYTES_PER_TOKEN} each");
            return Err(WireError::new("text", problem));
        }
        let most = f64::from(self.vocabulary.unwrap_or(u32::MAX)).ln() * tokens as f64 * ROUNDING + 1.0;
        if !(-1.0..=most).contains(&sample.entropy_sum) {
            let problem = format!("is {:e}, expected 0 to {most:.1} for {tokens} tokens", sample.entropy_sum);
            return Err(WireError::new("entropy_sum", problem));
        }
        self.routes(&sample.routes, purpose).map_err(|problem| WireError::new("routes", problem))
    }

    fn routes(&self, routes: &[u8], purpose: Purpose) -> Result<(), String> {
        match (&self.routes, purpose) {
            (Some(shape), Purpose::Train) => shape.check(routes, routes.len() / shape.token_bytes()),
            (Some(_), Purpose::Evaluate) | (None, _) if routes.is_empty() => Ok(()),
            (Some(_), Purpose::Evaluate) => {
                Err("is not empty, and routes of an evaluation are not replayed".to_owned())
            }
            (None, _) => Err("is not empty, and `rollout.router_replay` of the job is off".to_owned()),
        }
    }

    /// Checks that the routes of a sample that is trained on, of so many bytes, are those of its prompt and of its answer without the last
    /// token.
    pub(crate) fn route_count(&self, bytes: usize, prompt: usize, answer: usize) -> Result<(), WireError> {
        let inputs = (prompt + answer).saturating_sub(1);
        let expected = inputs.saturating_mul(self.route_bytes());
        if bytes == expected {
            return Ok(());
        }
        let problem = format!(
            "has {bytes} bytes, expected {expected} for {prompt} tokens of the prompt and {answer} of the answer without its last"
        );
        Err(WireError::new("routes", problem))
    }

    /// Checks a verdict against what the verifiers of the job can return.
    pub(crate) fn verdict(&self, verdict: &Verdict) -> Result<(), WireError> {
        let Verdict { outcome, label, reward, extracted, rule } = verdict;
        if let Some(kind) = self.built_in.filter(|_| outcome.is_conclusive() && *label != 0.0 && *label != 1.0) {
            let problem = format!("is {label}, expected 0 or 1 from `verifier.kind` = \"{kind}\"");
            return Err(WireError::new("label", problem));
        }
        let most = self.most_reward;
        if !(-most..=most).contains(reward) {
            let problem = format!("is {reward:e}, and with this job's `[reward]` it is within {most} of 0");
            return Err(WireError::new("reward", problem));
        }
        for (field, text) in [("extracted", extracted.as_deref().unwrap_or_default()), ("rule", rule)] {
            if text.len() > MOST_VERDICT_TEXT {
                let problem = format!("has {} bytes, expected at most {MOST_VERDICT_TEXT}", text.len());
                return Err(WireError::new(field, problem));
            }
        }
        Ok(())
    }

    /// Checks the reported verifications: only verifiers of the job, each at most once.
    pub(crate) fn verifications(&self, verifications: &[v1::Verification]) -> Result<(), WireError> {
        let (count, most) = (verifications.len(), self.verifiers.len());
        if count > most {
            return Err(WireError::new(
                "verifications",
                format!("has {count} entries, and the job has {most} verifiers"),
            ));
        }
        for (position, verification) in verifications.iter().enumerate() {
            let name = &verification.verifier;
            let Some((_, most)) = self.verifiers.iter().find(|(known, _)| known == name) else {
                let known: Vec<&str> = self.verifiers.iter().map(|(known, _)| known.as_str()).collect();
                let problem = format!("{} is not a verifier of this job: {}", shown(name), known.join(", "));
                return Err(WireError::new("verifications.verifier", problem));
            };
            if verifications[..position].iter().any(|earlier| earlier.verifier == *name) {
                return Err(WireError::new("verifications.verifier", format!("names `{name}` twice")));
            }
            if !(-most..=*most).contains(&verification.reward) {
                let problem = format!("is {:e} of `{name}`, expected -{most} to {most}", verification.reward);
                return Err(WireError::new("verifications.reward", problem));
            }
        }
        Ok(())
    }
}

/// A name from outside, quoted and cut for an error message.
fn shown(name: &str) -> String {
    const SHOWN: usize = 64;
    format!("{:?}", &name[..name.floor_char_boundary(SHOWN)])
}

/// Checks that no token claims weights newer than the newest version, which would evade the lag bound.
pub(crate) fn known_versions(spans: &[VersionSpan], newest: WeightVersion) -> Result<(), Status> {
    match spans.iter().map(|span| span.version).max().filter(|version| *version > newest) {
        Some(version) => Err(Status::failed_precondition(format!(
            "field `spans`: tokens of weights {version}, and the newest are {newest}; drop the sample"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pacs_types::{FinishReason, Outcome};

    use super::*;

    fn door(more: &str) -> Door {
        let text = format!(
            "name = 'test'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\nrollout.max_new_tokens = 4\n\
             evaluation = {{ before = false, after = false, every_steps = 0 }}\n{more}"
        );
        let spec = pacs_spec::parse(&text, Path::new("test")).unwrap_or_else(|error| panic!("{more}: {error}"));
        Door { vocabulary: Some(100), ..Door::new(&spec, None, None) }
    }

    fn sample() -> Sample {
        Sample {
            tokens: vec![5, 99, 0, 1],
            logprobs: vec![-0.5; 4],
            sampled_logprobs: Vec::new(),
            entropy_sum: 18.0,
            text: "42".into(),
            finish: FinishReason::Length,
            version: WeightVersion(3),
            spans: [3, 4].map(|version| VersionSpan { version: WeightVersion(version), tokens: 2 }).to_vec(),
            routes: Vec::new(),
        }
    }

    #[test]
    fn a_sample_is_what_its_lease_asked_for() {
        let door = door("");
        assert_eq!(door.sample(&sample(), Purpose::Train), Ok(()));
        let refused = |change: fn(&mut Sample)| {
            let mut sample = sample();
            change(&mut sample);
            let error = door.sample(&sample, Purpose::Train).expect_err("must be refused");
            (error.field, error.problem)
        };
        let (field, problem) = refused(|sample| sample.tokens.push(1));
        assert_eq!(
            (field, problem.as_str()),
            ("tokens", "has 5 values, and the lease allows 4 (`rollout.max_new_tokens`)")
        );
        let (field, problem) = refused(|sample| sample.tokens[2] = 100);
        assert_eq!((field, problem.as_str()), ("tokens", "holds 100, and the model's vocabulary has 100 tokens"));
        assert_eq!(refused(|sample| sample.text = "x".repeat(20_000)).0, "text");
        assert_eq!(refused(|sample| sample.entropy_sum = 1e300).0, "entropy_sum");
        assert_eq!(refused(|sample| sample.entropy_sum = -2.0).0, "entropy_sum");
        let unknown = Sample { tokens: vec![u32::MAX; 4], ..sample() };
        assert!(Door { vocabulary: None, ..door.clone() }.sample(&unknown, Purpose::Train).is_ok());
        assert!(known_versions(&sample().spans, WeightVersion(4)).is_ok());
        let ahead = known_versions(&sample().spans, WeightVersion(3)).expect_err("of the future");
        assert!(ahead.message().contains("weights v4, and the newest are v3"), "{ahead}");
    }

    #[test]
    fn routes_are_those_of_the_model_and_of_every_token() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3_moe");
        let model = ModelConfig::read(&folder).expect("a golden model");
        // Two layers with experts, of which two of eight compute a token.
        let routed = Door { routes: RouteShape::of(&model), ..door("") };
        assert_eq!((routed.route_bytes(), door("").route_bytes()), (4, 0));
        let check = |door: &Door, routes: &[u8], purpose| {
            let sample = Sample { routes: routes.to_vec(), ..sample() };
            door.sample(&sample, purpose).map_err(|error| (error.field, error.problem))
        };
        let refused = |routes: &[u8]| check(&routed, routes, Purpose::Train).expect_err("must be refused");
        assert_eq!(check(&routed, &[0, 7, 3, 1, 2, 5, 0, 6], Purpose::Train), Ok(()));
        for (routes, problem) in [
            (&[0, 7, 3, 8][..], "name expert 8, and a layer has 8"),
            (&[0, 7, 255, 1], "name expert 255, and a layer has 8"),
            (&[0, 7, 3, 3], "name expert 3 twice for one token of a layer"),
            (&[0, 7, 3, 1, 2], "take 5 bytes, expected 4 for 1 tokens"),
        ] {
            assert_eq!(refused(routes), ("routes", problem.to_owned()));
        }
        let of_evaluation = check(&routed, &[0, 7, 3, 1], Purpose::Evaluate).expect_err("evaluations are not replayed");
        assert_eq!(of_evaluation.0, "routes");
        assert_eq!(check(&routed, &[], Purpose::Evaluate), Ok(()));
        let (field, problem) = check(&door(""), &[0, 7, 3, 1], Purpose::Train).expect_err("the job records no routes");
        assert!(field == "routes" && problem.contains("`rollout.router_replay` of the job is off"), "{problem}");

        // Five tokens of a prompt, and three of the four of its answer.
        assert_eq!(routed.route_count(8 * 4, 5, 4), Ok(()));
        assert_eq!(door("").route_count(0, 5, 4), Ok(()));
        for bytes in [0, 7 * 4, 9 * 4] {
            let error = routed.route_count(bytes, 5, 4).expect_err("must be refused");
            assert!(error.problem.starts_with(&format!("has {bytes} bytes, expected 32")), "{error}");
        }
        let longest = Door { max_prompt_tokens: 1_000_000, ..routed.clone() };
        assert!(longest.sample_bytes() > 4_000_000 && routed.sample_bytes() < 32_000, "room for routes in a call");
    }

    #[test]
    fn a_verdict_is_what_the_verifiers_of_the_job_can_say() {
        let verdict = |label, reward| Verdict {
            outcome: Outcome::Wrong,
            label,
            reward,
            extracted: Some("x".into()),
            rule: "number".into(),
        };
        let field = |door: &Door, verdict: &Verdict| door.verdict(verdict).map_err(|error| error.field).err();
        let math = door("");
        assert_eq!(field(&math, &verdict(0.0, 0.0)), None);
        assert_eq!(field(&math, &verdict(0.5, 0.0)), Some("label"));
        assert_eq!(field(&math, &Verdict { outcome: Outcome::Failed, ..verdict(0.5, 0.0) }), None, "nobody reads it");
        assert_eq!(field(&math, &verdict(0.0, 3.0)), Some("reward"));
        let weighted = door("[reward]\nweight = 10.0\nformat_bonus = -5.0\nformat_strings = ['x']");
        assert_eq!(field(&weighted, &verdict(0.0, 15.0)), None);
        assert_eq!(field(&weighted, &verdict(0.0, 17.0)), Some("reward"));
        let own = door("[verifier]\nkind = 'exec'\ncommand = ['x']");
        assert_eq!(field(&own, &verdict(0.5, -1e6)), None);
        assert_eq!(field(&own, &verdict(0.5, 1e308)), Some("reward"));
        let long = "x".repeat(MOST_VERDICT_TEXT + 1);
        assert_eq!(field(&math, &Verdict { extracted: Some(long.clone()), ..verdict(0.0, 0.0) }), Some("extracted"));
        assert_eq!(field(&math, &Verdict { rule: long, ..verdict(0.0, 0.0) }), Some("rule"));
    }

    #[test]
    fn only_verifiers_of_the_job_are_counted_each_once() {
        let door = door("[reward.verifiers.style]\nkind = 'exec'\ncommand = ['x']");
        let verification = |verifier: &str, reward| v1::Verification {
            verifier: verifier.into(),
            outcome: v1::Outcome::Wrong.into(),
            reward,
            elapsed_us: 1,
            cached: false,
        };
        let check = |verifications: &[v1::Verification]| {
            door.verifications(verifications).map_err(|error| (error.field, error.problem)).err()
        };
        assert_eq!(check(&[verification("label", 1.0), verification("style", 1e6)]), None);
        let (field, problem) = check(&[verification(&"\u{1b}x".repeat(1 << 20), 0.0)]).expect("made up");
        assert_eq!(field, "verifications.verifier");
        assert!(problem.ends_with("is not a verifier of this job: label, style") && problem.len() < 1000, "{problem}");
        let twice = check(&[verification("label", 0.0), verification("label", 0.0)]);
        assert_eq!(twice, Some(("verifications.verifier", "names `label` twice".into())));
        assert_eq!(check(&[verification("label", 2.0)]).map(|(field, _)| field), Some("verifications.reward"));
        let three = [verification("label", 0.0), verification("style", 0.0), verification("label", 0.0)];
        assert_eq!(check(&three).map(|(field, _)| field), Some("verifications"));
    }

    #[test]
    fn a_call_has_room_for_the_longest_sample_of_the_job_and_little_more() {
        let door = door("");
        assert!((16_000..32_000).contains(&door.sample_bytes()), "{}", door.sample_bytes());
        let longest = Door { max_new_tokens: 1_000_000, ..door };
        assert_eq!(longest.sample_bytes(), pacs_protocol::MAX_MESSAGE_BYTES);
    }
}
