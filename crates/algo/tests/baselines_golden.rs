//! Advantages, policy losses, value losses and KL penalties against the reference vectors in
//! `tests/golden/baselines.json`.
//! The vectors are padded, objectives are not. Tokens with mask 0 are left out on the way in, and their derivative must
//! be 0 on the way out.
//! must be 0 on the way out.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::Path;

use pacs_algo::{
    AdvantageEstimator, Aggregation, Clip, KlKind, KlPenalty, KlPlace, ObjectiveError, ObjectiveMetrics, PolicyConfig,
    SequenceInfo, SequenceOutcome, StepSummary, TokenAdvantages, TokenData, ValueConfig, group_advantages, grpo, ppo,
};
use serde_json::Value;

const RELATIVE: f64 = 1e-12;
/// Cancelled terms of order one may leave rounding below this.
const ABSOLUTE: f64 = 1e-15;
/// Whitened numbers are differences from a mean divided by a deviation: their rounding is that of the mean.
const ABSOLUTE_WHITENED: f64 = 1e-14;

#[test]
fn every_advantage_matches() {
    let golden = Golden::read();
    let cases = golden.cases("advantage_cases", 51);
    for case in cases {
        let input = golden.input(case);
        let config = PolicyConfig { advantage: estimator(case), ..grpo() };
        let refused = lonely(&input, &config);
        let targets = if refused { without_comparison(&input, &config) } else { input.advantages(&config).unwrap() };
        let id = case["id"].as_str().unwrap();
        let absolute = if config.advantage.whitens() { ABSOLUTE_WHITENED } else { ABSOLUTE };
        for (i, targets) in targets.iter().enumerate() {
            compare(id, &input.padded(i, &targets.advantages), &case["expect"]["advantages"][i], absolute);
            if config.advantage.uses_values() {
                compare(id, &input.padded(i, &targets.returns), &case["expect"]["returns"][i], absolute);
            }
        }
    }
}

/// Whether a group of one is refused, because the estimator compares within a group.
fn lonely(input: &Input, config: &PolicyConfig) -> bool {
    let lonely = config.advantage.compares_group() && input.infos.iter().filter(|i| i.group == 0).count() == 1;
    if lonely {
        assert_eq!(input.advantages(config), Err(ObjectiveError::LonelySample { group: 0 }));
    }
    lonely
}

/// Advantages that published code computes for groups of one: with nothing to subtract, only whitening remains.
fn without_comparison(input: &Input, config: &PolicyConfig) -> Vec<TokenAdvantages> {
    if config.advantage.whitens() {
        let whitened = PolicyConfig { advantage: AdvantageEstimator::ReinforcePp { gamma: 1.0 }, ..*config };
        return input.advantages(&whitened).unwrap();
    }
    let alone = |info: &SequenceInfo| group_advantages(config.advantage, &[info.reward])[0];
    let every = |info: &SequenceInfo| vec![alone(info); info.tokens as usize];
    input.infos.iter().map(|info| TokenAdvantages { advantages: every(info), returns: Vec::new() }).collect()
}

#[test]
fn every_policy_loss_matches() {
    let golden = Golden::read();
    for case in golden.cases("policy_loss_cases", 34) {
        let (input, params) = (golden.input(case), &case["params"]);
        let number = |name: &str| params[name].as_f64().unwrap();
        let clip = Clip { low: number("clip_low"), high: number("clip_high"), dual: Some(number("clip_c")) };
        let config = PolicyConfig { clip, aggregation: aggregation(params, &input), ..grpo() };
        let advantages = golden.expected_advantages(&case["advantage_from"], &input, "advantages");
        let outcomes = input.outcomes(&config, &advantages);
        let id = case["id"].as_str().unwrap();
        let loss: f64 = outcomes.iter().map(|outcome| outcome.loss).sum();
        compare(id, &[loss], &list(&case["expect"]["policy_loss"]), ABSOLUTE);
        for (i, outcome) in outcomes.iter().enumerate() {
            let derivatives = input.padded(i, &outcome.dloss_dlogprob);
            compare(id, &derivatives, &case["expect"]["dpolicy_dlogprob"][i], ABSOLUTE);
        }
        for (ours, theirs) in [
            ("ratio_clipped_share", "clip_fraction"),
            ("ratio_dual_clipped_share", "clip_fraction_lower"),
            ("policy_kl_k1", "approx_kl"),
        ] {
            compare(id, &[metric(&outcomes, ours)], &list(&case["expect"][theirs]), ABSOLUTE);
        }
    }
}

#[test]
fn every_value_loss_matches() {
    let golden = Golden::read();
    for case in golden.cases("value_loss_cases", 6) {
        let (input, params) = (golden.input(case), &case["params"]);
        let value = ValueConfig {
            clip: params["value_clip"].as_f64().unwrap(),
            aggregation: aggregation(params, &input),
            warmup_steps: 0,
        };
        let config = PolicyConfig { value: Some(value), ..ppo() };
        let mut targets = golden.expected_advantages(&case["returns_from"], &input, "advantages");
        let returns = golden.expected_advantages(&case["returns_from"], &input, "returns");
        targets.iter_mut().zip(returns).for_each(|(targets, returns)| targets.returns = returns.advantages);
        let outcomes = input.outcomes(&config, &targets);
        let id = case["id"].as_str().unwrap();
        let loss: f64 = outcomes.iter().map(|outcome| outcome.value_loss).sum();
        compare(id, &[loss], &list(&case["expect"]["value_loss"]), ABSOLUTE);
        for (i, outcome) in outcomes.iter().enumerate() {
            let derivatives = input.padded(i, outcome.dloss_dvalue.as_ref().unwrap());
            compare(id, &derivatives, &case["expect"]["dvalue_dvpred"][i], ABSOLUTE);
        }
        let share = metric(&outcomes, "value_clipped_share");
        compare(id, &[share], &list(&case["expect"]["value_clip_fraction"]), ABSOLUTE);
    }
}

#[test]
fn every_kl_penalty_matches() {
    let golden = Golden::read();
    for case in golden.cases("kl_cases", 8) {
        let (input, params) = (golden.input(case), &case["params"]);
        let kind = match params["kind"].as_str().unwrap() {
            "kl" => KlKind::K1,
            "abs" => KlKind::Abs,
            "mse" => KlKind::K2,
            "low_var_kl" => KlKind::K3,
            other => panic!("KL kind {other}"),
        };
        let kl = Some(KlPenalty { coefficient: 1.0, kind, place: KlPlace::Loss });
        let config = PolicyConfig { kl, aggregation: aggregation(params, &input), ..grpo() };
        // Without advantages, only the penalty remains of the loss.
        let zeros: Vec<TokenAdvantages> = (0..input.infos.len())
            .map(|i| TokenAdvantages { advantages: vec![0.0; input.infos[i].tokens as usize], returns: Vec::new() })
            .collect();
        let outcomes = input.outcomes(&config, &zeros);
        let id = case["id"].as_str().unwrap();
        let loss: f64 = outcomes.iter().map(|outcome| outcome.loss).sum();
        compare(id, &[loss], &list(&case["expect"]["kl_loss"]), ABSOLUTE);
        for (i, outcome) in outcomes.iter().enumerate() {
            let by_token: Vec<f64> = input.new[i]
                .iter()
                .zip(&input.reference[i])
                .map(|(new, reference)| kind.value(new - reference))
                .collect();
            compare(id, &input.padded(i, &by_token), &case["expect"]["kl_per_token"][i], ABSOLUTE);
            let derivatives = input.padded(i, &outcome.dloss_dlogprob);
            compare(id, &derivatives, &case["expect"]["dkl_dlogprob"][i], ABSOLUTE);
        }
    }
}

fn compare(id: &str, measured: &[f64], expected: &Value, absolute: f64) {
    let expected = numbers(expected);
    assert_eq!(measured.len(), expected.len(), "{id}");
    for (i, (m, e)) in measured.iter().zip(&expected).enumerate() {
        assert!((m - e).abs() <= RELATIVE * e.abs() + absolute, "{id}: number {i} is {m}, not {e}");
    }
}

fn list(number: &Value) -> Value {
    Value::Array(vec![number.clone()])
}

fn metric(outcomes: &[SequenceOutcome], name: &str) -> f64 {
    let mut metrics = ObjectiveMetrics::default();
    outcomes.iter().for_each(|outcome| metrics.merge(&outcome.metrics));
    metrics.named().into_iter().find(|(known, _)| *known == name).unwrap().1
}

fn estimator(case: &Value) -> AdvantageEstimator {
    let number = |name: &str| case["params"][name].as_f64().unwrap();
    match case["estimator"].as_str().unwrap() {
        "grpo" => AdvantageEstimator::Grpo,
        "dr_grpo" => AdvantageEstimator::DrGrpo,
        "rloo" => AdvantageEstimator::Rloo,
        "reinforce_pp" => AdvantageEstimator::ReinforcePp { gamma: number("gamma") },
        "reinforce_pp_baseline" => AdvantageEstimator::ReinforcePpBaseline,
        "remax" => AdvantageEstimator::Remax,
        "gae" => AdvantageEstimator::Gae { gamma: number("gamma"), lambda: number("lambda") },
        other => panic!("estimator {other}"),
    }
}

fn aggregation(params: &Value, input: &Input) -> Aggregation {
    match params["agg"].as_str().unwrap() {
        "token-mean" => Aggregation::TokenMean,
        "seq-mean-token-sum" => Aggregation::SeqMeanTokenSum,
        "seq-mean-token-mean" => Aggregation::SeqMeanTokenMean,
        "seq-mean-token-sum-norm" => Aggregation::TokenSumNorm { length: input.masks[0].len() as f64 },
        other => panic!("aggregation {other}"),
    }
}

struct Golden(Value);

impl Golden {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/baselines.json");
        Self(serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap())
    }

    fn cases(&self, kind: &str, count: usize) -> &[Value] {
        let cases = self.0[kind].as_array().unwrap();
        assert_eq!(cases.len(), count, "{kind}");
        cases
    }

    fn input(&self, case: &Value) -> Input {
        Input::new(&self.0["inputs"][case["input"].as_str().unwrap()])
    }

    /// Advantages (or returns, in their place) that the case with this id expects.
    fn expected_advantages(&self, id: &Value, input: &Input, what: &str) -> Vec<TokenAdvantages> {
        let case = self.0["advantage_cases"].as_array().unwrap().iter().find(|case| &case["id"] == id).unwrap();
        let unpadded = |i: usize| input.unpadded(i, &case["expect"][what][i]);
        let every = |i: usize| TokenAdvantages { advantages: unpadded(i), returns: Vec::new() };
        (0..input.infos.len()).map(every).collect()
    }
}

/// One input of the vectors, without padding.
struct Input {
    infos: Vec<SequenceInfo>,
    masks: Vec<Vec<f64>>,
    new: Vec<Vec<f64>>,
    old: Vec<Vec<f64>>,
    reference: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    new_values: Vec<Vec<f64>>,
}

impl Input {
    fn new(input: &Value) -> Self {
        let rows = input["mask"].as_array().unwrap().len();
        let mut this = Self {
            infos: Vec::new(),
            masks: input["mask"].as_array().unwrap().iter().map(numbers).collect(),
            new: Vec::new(),
            old: Vec::new(),
            reference: Vec::new(),
            values: Vec::new(),
            new_values: Vec::new(),
        };
        let (groups, greedy) = (numbers(&input["group"]), numbers(&input["baseline"]));
        for i in 0..rows {
            let rewards = this.unpadded(i, &input["token_rewards"][i]);
            let (last, others) = rewards.split_last().unwrap();
            assert!(others.iter().all(|reward| *reward == 0.0), "the reward sits on the last token");
            this.infos.push(SequenceInfo {
                group: groups[i] as u64,
                label: 0.0,
                reward: *last,
                greedy_reward: Some(greedy[i]),
                tokens: rewards.len() as u32,
                truncated: false,
            });
            this.new.push(this.unpadded(i, &input["new_logprob"][i]));
            this.old.push(this.unpadded(i, &input["old_logprob"][i]));
            this.reference.push(this.unpadded(i, &input["ref_logprob"][i]));
            this.values.push(this.unpadded(i, &input["values"][i]));
            this.new_values.push(this.unpadded(i, &input["new_values"][i]));
        }
        this
    }

    fn tokens(&self, i: usize) -> TokenData<'_> {
        TokenData {
            new: &self.new[i],
            old: &self.old[i],
            rollout: None,
            reference: Some(&self.reference[i]),
            entropies: None,
            values: Some(&self.values[i]),
            new_values: Some(&self.new_values[i]),
        }
    }

    fn advantages(&self, config: &PolicyConfig) -> Result<Vec<TokenAdvantages>, ObjectiveError> {
        let rows = || self.infos.iter().enumerate();
        let summaries: Vec<StepSummary> =
            rows().map(|(i, info)| config.summary(i, info, &self.tokens(i))).collect::<Result<_, _>>()?;
        let baseline = config.baseline(&self.infos, &summaries)?;
        rows().map(|(i, info)| config.advantages(&baseline, i, info, &self.tokens(i))).collect()
    }

    fn outcomes(&self, config: &PolicyConfig, targets: &[TokenAdvantages]) -> Vec<SequenceOutcome> {
        let normaliser = config.normaliser(&self.infos).unwrap();
        let rows = self.infos.iter().zip(targets).enumerate();
        rows.map(|(i, (info, targets))| config.sequence(&normaliser, i, info, targets, &self.tokens(i)).unwrap())
            .collect()
    }

    fn unpadded(&self, i: usize, row: &Value) -> Vec<f64> {
        numbers(row).into_iter().zip(&self.masks[i]).filter(|(_, mask)| **mask == 1.0).map(|(value, _)| value).collect()
    }

    fn padded(&self, i: usize, tokens: &[f64]) -> Vec<f64> {
        let mut tokens = tokens.iter();
        self.masks[i].iter().map(|mask| if *mask == 1.0 { *tokens.next().unwrap() } else { 0.0 }).collect()
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}
