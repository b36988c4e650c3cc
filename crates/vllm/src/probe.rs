//! What the probe of a version says of a server: whether it computes with the weights that it was given.
//!
//! Checksums show what a server holds, not what it computes with: on a CPU vLLM packs the weights of the output head, and once kept
//! the first ones while every checksum changed. So the learner scores one sequence with each version and with the version before
//! ([`Probe`]), the server scores it after each update, and the three are compared.

use std::collections::VecDeque;

use pacs_weights::{Probe, VersionId};

/// Errors of a server that make up its noise.
const REMEMBERED: usize = 16;
/// Least mean uncertainty that an error is divided by: below it rounding of the log-prob itself is all that is left.
const LEAST_UNCERTAINTY: f64 = 1e-3;
/// Least noise (nats per token): log-probs are exchanged in float32.
const FLOAT_NOISE: f64 = 1e-6;
/// Least answer (tokens) that a server is judged by: the signs of fewer differences agree by chance.
const LEAST_TOKENS: usize = 8;
/// Number of times that an update must have changed more than the noise, for one probe to tell.
const TELLING: f64 = 4.0;
/// Number of times its noise, and least part of the update, that the error of a server with other weights is.
const FAR: f64 = 10.0;
/// Evidence against a server (nats) at which it is stale: for one with the new weights, it is reached once in e^32 = 8e13 versions.
const PROOF: f64 = 32.0;

/// Log-probs of a probe by a server, compared with the learner's: mean absolute differences (nats per token).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Comparison {
    /// From the learner's under the version that the server was given.
    pub(crate) error: f64,
    /// From the learner's under the version before.
    pub(crate) from_previous: f64,
    /// Between the learner's under the two: what the update changed.
    pub(crate) change: f64,
    /// Tokens of the answer.
    pub(crate) tokens: usize,
    uncertainty: f64,
}

impl Comparison {
    /// `scored` are the server's log-probs of the answer.
    pub(crate) fn new(probe: &Probe, scored: &[f32]) -> Self {
        let (now, previous) = (probe.logprobs(), probe.previous_logprobs());
        Self {
            error: difference(scored, now),
            from_previous: difference(scored, previous),
            change: difference(now, previous),
            tokens: now.len(),
            uncertainty: uncertainty(now),
        }
    }
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    mean(a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())))
}

/// Mean of `1 - p`. The log-prob of a token with probability `p` moves by `1 - p` times what its logit moves by, so an error divided by
/// this is comparable between a sequence that the policy is certain of and one that it is not.
fn uncertainty(logprobs: &[f32]) -> f64 {
    mean(logprobs.iter().map(|logprob| 1.0 - f64::from(*logprob).exp())).max(LEAST_UNCERTAINTY)
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

/// What follows from a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judgement {
    /// Nothing speaks against the server.
    Fits,
    /// It computes with older weights, wholly or in part. It is not used, and tried again.
    Stale(Sign),
    /// Its log-probs are further from the learner's than the job allows, and not for being those of the version before.
    Off,
}

/// By what a stale server is known; completes "its log-probs …".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// One probe is clearly nearer to the version before.
    Nearer,
    /// The probes of several versions together are likelier under the version before each than under the version itself.
    Likelier,
    /// One probe is far from the new version for this server.
    Far,
}

impl Sign {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Nearer => "are nearer to the version before",
            Self::Likelier => "fit the version before each update better than the one after it",
            Self::Far => "are further off than its noise explains",
        }
    }
}

/// What is known of one server's log-probs from the versions that were verified on it.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// The last errors, each divided by the uncertainty of its sequence.
    errors: VecDeque<f64>,
    /// Log of how much likelier its last scores are with the weights of the version before each; never below 0, so that what
    /// spoke for it long ago does not.
    evidence: f64,
    /// The version that was weighed last, and the evidence before it: a server that is tried again with a version is weighed anew.
    weighed: Option<(VersionId, f64)>,
}

impl Record {
    /// Whether no error was noted yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// Notes the error of a version that is known to be the right one.
    pub(crate) fn note(&mut self, seen: &Comparison) {
        self.add(seen.error, seen.uncertainty);
    }

    /// Notes the error of a server that still serves the version before, just before the update: its noise on the very tokens that it
    /// is judged by next.
    pub(crate) fn note_before(&mut self, probe: &Probe, scored: &[f32]) {
        let previous = probe.previous_logprobs();
        self.add(difference(scored, previous), uncertainty(previous));
    }

    fn add(&mut self, error: f64, uncertainty: f64) {
        if self.errors.len() == REMEMBERED {
            self.errors.pop_front();
        }
        self.errors.push_back(error / uncertainty);
    }

    /// A server that was started anew may have been mended.
    pub(crate) fn restarted(&mut self) {
        (self.evidence, self.weighed) = (0.0, None);
    }

    /// The largest error to be expected of the server on a sequence (nats per token); `None` before the first was noted.
    pub(crate) fn noise(&self, seen: &Comparison) -> Option<f64> {
        let largest = self.errors.iter().copied().reduce(f64::max);
        largest.map(|error| (error * seen.uncertainty).max(FLOAT_NOISE))
    }

    /// Judges a server by its log-probs of the probe of version `id`; an error above `most` is [`Judgement::Off`].
    ///
    /// Let `n` be the error, `o` the difference from the previous version's log-probs and `d` what the update changed. By the triangle
    /// inequality `n + o >= d`. A server with the new weights has its noise as `n`; one with the previous weights has it as `o`. So one
    /// probe tells them apart where `d` is several times the noise. A fixed threshold would be of no use: an update changes 1e-3 nats
    /// at usual learning rates, a server in float32 errs by 1e-7 and one in bfloat16 by 1e-2. The yardstick is the largest error of
    /// this server on verified versions, among them the one before on these very tokens ([`Self::note_before`]). It is stale
    ///
    /// - if `d >= 4 noise` and `o <= n / 2`. One with the previous weights has `o <= noise <= d / 4`, hence `n >= 3 d / 4`, and is caught
    ///   for certain. One with the new weights would need `n >= 2 d / 3 >= 8 / 3 noise`, and errors that undo half of the update
    ///   token by token. Before its first error is known, `o` stands for the noise: it is that if the server is stale, and `d` if not.
    /// - if `d >= 4 noise`, `n >= 10 noise` and `n >= d / 10`. This one is stale in part (a new embedding and an old head), or by
    ///   several versions after it was away: near neither version, but off by a share of what updates change. Rounding errors
    ///   do not grow tenfold from one version to the next.
    /// - if the evidence of several versions proves it, where each update changes less than the noise, as in bfloat16 with a small
    ///   learning rate. That of `t` tokens is `t (n - o) / (2 noise)`: half the log of the likelihood ratio for errors with a Laplace
    ///   distribution, which no outlier dominates; half, so that it is a bound for normal errors, too. A server with the new weights
    ///   drives a sum that is kept at 0 or above to `x` no more often than once in `exp(x)` versions (CUSUM; Lorden 1971).
    pub(crate) fn judge(&mut self, id: VersionId, seen: &Comparison, most: f64) -> Judgement {
        let Comparison { error, from_previous, change, tokens, .. } = *seen;
        let known = self.noise(seen);
        let noise = known.unwrap_or(from_previous.max(FLOAT_NOISE));
        if let Some(noise) = known {
            let before = self.weighed.filter(|(weighed, _)| *weighed == id).map_or(self.evidence, |(_, before)| before);
            self.weighed = Some((id, before));
            let of_this = tokens as f64 * (error - from_previous) / (2.0 * noise);
            // Not above the proof, so that a server that was mended is soon used again.
            self.evidence = (before + of_this).clamp(0.0, PROOF);
        }
        let tells = tokens >= LEAST_TOKENS && change >= TELLING * noise;
        if tells && from_previous <= error / 2.0 {
            return Judgement::Stale(Sign::Nearer);
        }
        if self.evidence >= PROOF {
            return Judgement::Stale(Sign::Likelier);
        }
        if error > most {
            return Judgement::Off;
        }
        if tells && known.is_some() && error >= FAR * noise && error >= change / FAR {
            return Judgement::Stale(Sign::Far);
        }
        Judgement::Fits
    }
}

#[cfg(test)]
mod tests {
    use std::ops::RangeInclusive;

    use pacs_types::{WeightVersion, mix};

    use super::*;

    const TOKENS: u64 = 200;
    const MOST: f64 = 0.5;

    /// A number from -1 to 1, by its name.
    fn number(name: [u64; 3]) -> f32 {
        let bits = name.into_iter().fold(7, |bits, part| mix(bits ^ part));
        (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// The learner's log-probs under a version. Each version moves each token by up to `step`.
    fn policy(version: u64, step: f32) -> Vec<f32> {
        let of = |token: u64| -> f32 {
            let moved: f32 = (1..=version).map(|version| step * number([version, token, 0])).sum();
            -8.0 + number([0, token, 0]) + moved
        };
        (0..TOKENS).map(of).collect()
    }

    fn with_noise(logprobs: &[f32], noise: f32, version: u64) -> Vec<f32> {
        logprobs.iter().zip(0..).map(|(logprob, token)| logprob + noise * number([version, token, 1])).collect()
    }

    fn probe(version: u64, step: f32) -> Probe {
        let tokens = vec![1; TOKENS as usize + 1];
        let previous = WeightVersion(version - 1);
        Probe::new(tokens, 1, policy(version, step), policy(version - 1, step), previous).expect("a probe")
    }

    /// What follows from each version for a server with the log-probs that `server` returns for it.
    fn judge(
        record: &mut Record,
        step: f32,
        versions: RangeInclusive<u64>,
        server: impl Fn(u64) -> Vec<f32>,
    ) -> Vec<Judgement> {
        let of = |version| {
            let seen = Comparison::new(&probe(version, step), &server(version));
            let judgement = record.judge(VersionId::new(1, version), &seen, MOST);
            if judgement == Judgement::Fits {
                record.note(&seen);
            }
            judgement
        };
        versions.map(of).collect()
    }

    fn all_fit(judged: &[Judgement]) -> bool {
        judged.iter().all(|judgement| *judgement == Judgement::Fits)
    }

    #[test]
    fn good_servers_fit_whatever_their_noise_and_the_size_of_updates() {
        for noise in [0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.5] {
            for step in [0.0, 1e-5, 1e-3, 1e-2, 0.1] {
                let server = |version| with_noise(&policy(version, step), noise, version);
                let judged = judge(&mut Record::default(), step, 1..=60, server);
                assert!(all_fit(&judged), "noise {noise}, step {step}: {judged:?}");
            }
        }
    }

    #[test]
    fn a_server_that_keeps_the_version_before_is_stale_at_once() {
        for noise in [0.0_f32, 1e-6, 1e-4, 1e-2] {
            let step = (noise * 20.0).max(1e-4);
            let good = |version| with_noise(&policy(version, step), noise, version);
            let stale = |version| with_noise(&policy(9, step), noise, version);
            let mut record = Record::default();
            let judged = judge(&mut record, step, 1..=9, good);
            assert!(all_fit(&judged), "noise {noise}: {judged:?}");
            for _ in 0..3 {
                assert_eq!(judge(&mut record, step, 10..=10, stale), [Judgement::Stale(Sign::Nearer)], "{noise}");
            }
            // A worker that has not seen the server before knows it, too.
            let fresh = judge(&mut Record::default(), step, 10..=10, stale);
            assert_eq!(fresh, [Judgement::Stale(Sign::Nearer)], "{noise}");
            // It fits as soon as it has loaded the version.
            assert_eq!(judge(&mut record, step, 10..=10, good), [Judgement::Fits], "{noise}");
        }
    }

    #[test]
    fn a_server_that_is_stale_in_part_or_by_several_versions_is_far() {
        let step = 1e-2;
        let good = |version| with_noise(&policy(version, step), 1e-5, version);
        let partly = |version: u64| -> Vec<f32> {
            let (new, old) = (policy(version, step), policy(version - 1, step));
            new.iter().zip(&old).map(|(new, old)| 0.6 * new + 0.4 * old).collect()
        };
        // The first probe of all: its tokens were scored under the version before.
        let mut record = Record::default();
        record.note_before(&probe(1, step), &policy(0, step));
        assert_eq!(judge(&mut record, step, 1..=1, partly), [Judgement::Stale(Sign::Far)]);
        assert!(all_fit(&judge(&mut record, step, 1..=4, good)));
        assert_eq!(judge(&mut record, step, 5..=5, partly), [Judgement::Stale(Sign::Far)]);
        // One that was away for seven versions, and returns with what it had or with what it was given.
        let away = |_| with_noise(&policy(4, step), 1e-5, 4);
        let judged = judge(&mut record, step, 12..=12, away);
        assert!(matches!(judged[..], [Judgement::Stale(_)]), "{judged:?}");
        assert_eq!(judge(&mut record, step, 12..=12, good), [Judgement::Fits]);
    }

    #[test]
    fn updates_below_the_noise_tell_when_there_are_several() {
        let (noise, step) = (1e-2, 4e-3);
        let mut record = Record::default();
        let stale = |version: u64| with_noise(&policy(version.min(20), step), noise, version);
        let judged = judge(&mut record, step, 1..=60, stale);
        let first = judged.iter().position(|judgement| *judgement != Judgement::Fits).expect("it is found");
        // The first entry is version 1.
        assert!((21..40).contains(&first), "at version {}", first + 1);
        assert_eq!(judged[first], Judgement::Stale(Sign::Likelier));
        record.restarted();
        assert_eq!(record.evidence, 0.0);
        // A version counts once, however often a server is tried with it.
        let seen = Comparison::new(&probe(22, step), &with_noise(&policy(20, step), noise, 22));
        let id = VersionId::new(1, 22);
        record.judge(id, &seen, MOST);
        let once = record.evidence;
        record.judge(id, &seen, MOST);
        assert!(once > 0.0 && record.evidence == once, "{once}");
    }

    #[test]
    fn an_error_beyond_the_limit_is_no_staleness_unless_it_is_nearer() {
        let far = |version| policy(version, 1e-3).iter().map(|logprob| logprob - 3.0).collect();
        assert_eq!(judge(&mut Record::default(), 1e-3, 1..=1, far), [Judgement::Off]);
        let stale = |_| policy(0, 2.0);
        assert_eq!(judge(&mut Record::default(), 2.0, 1..=1, stale), [Judgement::Stale(Sign::Nearer)]);
    }

    #[test]
    fn a_few_tokens_accuse_nobody() {
        let probe = Probe::new(vec![1; 5], 1, vec![-1.0; 4], vec![-1.5; 4], WeightVersion(0)).expect("a probe");
        let seen = Comparison::new(&probe, &[-1.5; 4]);
        assert_eq!((seen.error, seen.from_previous, seen.change), (0.5, 0.0, 0.5));
        assert_eq!(Record::default().judge(VersionId::new(1, 1), &seen, 1.0), Judgement::Fits);
        assert_eq!(Record::default().judge(VersionId::new(1, 1), &seen, 0.4), Judgement::Off);
    }

    #[test]
    fn errors_are_compared_by_how_sure_the_policy_is() {
        let of = |logprob: f32, error: f32| {
            let logprobs = vec![logprob; 10];
            let probe = Probe::new(vec![1; 11], 1, logprobs.clone(), logprobs, WeightVersion(0)).expect("a probe");
            Comparison::new(&probe, &[logprob + error; 10])
        };
        // The same error in the logits of a token with probability 0.99 and of one with 0.5.
        let (sure, unsure) = (of(-0.01, 1e-4), of(-0.7, 5e-3));
        let mut record = Record::default();
        assert_eq!(record.noise(&sure), None);
        record.note(&sure);
        let expected = record.noise(&unsure).expect("it is known") / unsure.error;
        assert!((0.9..1.1).contains(&expected), "{expected}");
    }
}
