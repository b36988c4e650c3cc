//! Properties that every objective must have for any input, through the interface of the learner.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use pacs_algo::{
    AdvantageEstimator, Aggregation, Answer, Clip, DiscoConfig, ImportanceLevel, ImportanceMode, ImportanceWeights,
    KlKind, KlPenalty, KlPlace, LabelWeights, LogprobSums, Needs, Objective, ObjectiveError, ObjectiveMetrics,
    ObjectiveStep, PacsConfig, PolicyConfig, RealConfig, RewardMethod, ScoreEstimator, SequenceInfo, StepSummary,
    Surrogate, TokenData, ValueConfig, cispo, dapo, dppo, dr_grpo, grpo, gspo, maxrl, ppo, reinforce_pp,
    reinforce_pp_baseline, remax, rloo, weighted_rloo,
};
use proptest::prelude::*;

proptest! {
    #[test]
    fn derivatives_match_finite_differences(
        batch in batch(),
        objective in objective(),
        at in any::<prop::sample::Index>(),
        token in any::<prop::sample::Index>(),
    ) {
        // Constant weights are invisible to finite differences; the vectors of plain PyTorch cover them.
        let constants = match &objective {
            Objective::Policy(config) => config.surrogate != Surrogate::Clipped,
            _ => false,
        };
        prop_assume!(!constants);
        let step = objective.evaluate(&batch.answers()).unwrap();
        let i = at.index(batch.0.len());
        let t = token.index(batch.0[i].new.len());
        let outcome = &step.sequences[i];
        let tolerance = 1e-5 * (1.0 + outcome.dloss_dlogprob[t].abs());
        if let Some(slope) = slope(&objective, &batch, |batch, shift| batch.0[i].new[t] += shift, |step| step.loss) {
            prop_assert!((slope - outcome.dloss_dlogprob[t]).abs() < tolerance, "{slope}: {outcome:?}");
        }
        if let Some(slope) = slope(&objective, &batch, |batch, shift| batch.0[i].entropies[t] += shift, |step| step.loss) {
            prop_assert!((slope - outcome.dloss_dentropy).abs() < tolerance, "{slope}: {outcome:?}");
        }
        let by_value = outcome.dloss_dvalue.as_ref().map_or(0.0, |derivatives| derivatives[t]);
        let value_loss = |step: &ObjectiveStep| step.value_loss;
        if let Some(slope) = slope(&objective, &batch, |batch, shift| batch.0[i].new_values[t] += shift, value_loss) {
            prop_assert!((slope - by_value).abs() < tolerance, "{slope}: {outcome:?}");
        }
    }

    #[test]
    fn the_order_of_the_answers_does_not_matter((batch, order) in batch_and_order(), objective in objective()) {
        let moved = Batch(order.iter().map(|&i| batch.0[i].clone()).collect());
        let (plain, moved) = (objective.evaluate(&batch.answers()).unwrap(), objective.evaluate(&moved.answers()).unwrap());
        prop_assert!(close(plain.loss, moved.loss) && close(plain.value_loss, moved.value_loss));
        for (at, &from) in order.iter().enumerate() {
            let pairs = plain.sequences[from].dloss_dlogprob.iter().zip(&moved.sequences[at].dloss_dlogprob);
            for (a, b) in pairs {
                prop_assert!(close(*a, *b), "{a} and {b}");
            }
        }
    }

    #[test]
    fn ranks_need_only_what_is_said((batch, ranks) in batch_on_ranks(), objective in objective()) {
        let whole = objective.evaluate(&batch.answers()).unwrap();
        let parts: Vec<Part> = (0..3).map(|rank| Part::compute(&objective, &batch, &ranks, rank)).collect();
        let loss: f64 = parts.iter().map(|part| part.loss).sum();
        prop_assert!(close(loss, whole.loss));
        for (i, rank) in ranks.iter().enumerate() {
            prop_assert_eq!(&parts[*rank].derivatives[i], &whole.sequences[i].dloss_dlogprob);
        }
        let mut metrics = ObjectiveMetrics::default();
        parts.iter().for_each(|part| metrics.merge(&ObjectiveMetrics::from_slice(&part.metrics.to_vec())));
        for (name, value) in metrics.named() {
            prop_assert!((value - whole.metrics[name]).abs() < 1e-9 * (1.0 + value.abs()), "{name}");
        }
    }

    #[test]
    fn on_policy_the_coefficients_are_known_before_the_forward(mut batch in batch(), objective in objective()) {
        let objective = match objective {
            Objective::Pacs(config) => {
                let reward_method = RewardMethod::LogRatio;
                Objective::Pacs(PacsConfig { reward_method, importance: None, ..config })
            }
            // The scores are log-probs, which log-ratios do not determine.
            Objective::Disco(_) | Objective::External => return Ok(()),
            Objective::Real(_) => objective,
            Objective::Policy(config) => {
                let advantage = if config.advantage.uses_values() { grpo().advantage } else { config.advantage };
                let config = PolicyConfig { advantage, kl: None, importance: None, entropy: 0.0, value: None, ..config };
                if config.surrogate != Surrogate::Clipped {
                    return Ok(());
                }
                Objective::Policy(config)
            }
        };
        prop_assert!(objective.needs().known_on_policy);
        batch.0.iter_mut().for_each(|sample| sample.new = sample.old.clone());
        let computed = objective.evaluate(&batch.answers()).unwrap();
        for sample in &mut batch.0 {
            sample.new.fill(0.0);
            sample.old.fill(0.0);
        }
        let known = objective.evaluate(&batch.answers()).unwrap();
        let coefficients = |step: &ObjectiveStep| -> Vec<f64> {
            step.sequences.iter().flat_map(|sequence| sequence.dloss_dlogprob.clone()).collect()
        };
        for (a, b) in coefficients(&computed).into_iter().zip(coefficients(&known)) {
            prop_assert!(close(a, b), "{a} and {b}");
        }
        prop_assert!(close(computed.loss, known.loss));
    }

    #[test]
    fn what_is_masked_has_no_influence(mut batch in batch(), objective in objective()) {
        let Objective::Policy(config) = objective else { return Ok(()) };
        // What the start of a step reads of every answer (values, a penalised reward) must be finite.
        let kl = config.kl.map(|kl| KlPenalty { place: KlPlace::Loss, ..kl });
        let objective = Objective::Policy(PolicyConfig { mask_truncated: true, kl, ..config });
        // Whitening needs two tokens.
        batch.0.push(sample(9, 1.0, false, &[(-1.0, 0.1, 0.2, 0.3); 2]));
        batch.0.push(sample(9, 0.0, false, &[(-1.0, 0.1, 0.2, 0.3)]));
        let before = objective.evaluate(&batch.answers()).unwrap();
        for sample in batch.0.iter_mut().filter(|sample| sample.info.truncated) {
            // Not even the number of tokens matters.
            *sample = Sample { info: sample.info, ..self::sample(0, 0.0, true, &[(-1.0, 0.0, 0.0, 0.0); 9]) };
            sample.info.tokens = 9;
            for numbers in [&mut sample.new, &mut sample.old, &mut sample.rollout, &mut sample.new_values] {
                numbers.fill(f64::NAN);
            }
        }
        let after = objective.evaluate(&batch.answers()).unwrap();
        prop_assert_eq!((before.loss, before.value_loss, &before.metrics), (after.loss, after.value_loss, &after.metrics));
        for (i, sample) in batch.0.iter().enumerate() {
            match sample.info.truncated {
                true => prop_assert_eq!(&after.sequences[i].dloss_dlogprob, &vec![0.0; 9]),
                false => prop_assert_eq!(&before.sequences[i], &after.sequences[i]),
            }
        }
    }

    #[test]
    fn inert_answers_have_no_gradient(batch in batch(), objective in objective()) {
        let answers = batch.answers();
        let infos: Vec<SequenceInfo> = answers.iter().map(|answer| answer.info).collect();
        let summaries: Vec<StepSummary> =
            answers.iter().enumerate().map(|(i, a)| objective.summary(i, &a.info, &a.tokens).unwrap()).collect();
        let baseline = objective.baseline(&infos, &summaries).unwrap();
        let step = objective.evaluate(&answers).unwrap();
        for (i, answer) in answers.iter().enumerate() {
            let advantages = objective.advantages(&baseline, i, &answer.info, &answer.tokens).unwrap();
            if objective.inert(&answer.info, &advantages).is_some() {
                prop_assert!(step.sequences[i].dloss_dlogprob.iter().all(|coefficient| *coefficient == 0.0));
                prop_assert_eq!((step.sequences[i].loss, step.sequences[i].dloss_dentropy), (0.0, 0.0));
            } else if let Objective::Policy(config) = objective {
                let pulled = config.kl.is_some() || config.entropy > 0.0 || config.value.is_some();
                prop_assert!(pulled || advantages.advantages.iter().any(|advantage| *advantage != 0.0));
            }
        }
    }

    #[test]
    fn missing_numbers_are_refused_and_unread_ones_are_not_needed(mut batch in batch(), objective in objective()) {
        let Needs { old, rollout, reference, values, entropy, .. } = objective.needs();
        // Nothing is read of a masked answer.
        batch.0[0].info.truncated = false;
        let empty: &[f64] = &[];
        let without = |change: fn(&mut TokenData<'_>)| {
            let mut answers = batch.answers();
            answers.iter_mut().for_each(|answer| change(&mut answer.tokens));
            objective.evaluate(&answers)
        };
        let whole = objective.evaluate(&batch.answers()).unwrap();
        for (needed, result) in [
            (old, without(|tokens| tokens.old = &[])),
            (rollout, without(|tokens| tokens.rollout = None)),
            (reference, without(|tokens| tokens.reference = None)),
            (values, without(|tokens| (tokens.values, tokens.new_values) = (None, None))),
            (entropy, without(|tokens| tokens.entropies = None)),
        ] {
            if needed {
                prop_assert!(matches!(result, Err(ObjectiveError::Tokens { values: 0, .. })), "{result:?}");
            } else {
                prop_assert_eq!(result.as_ref(), Ok(&whole));
            }
        }
        let mut answers = batch.answers();
        answers[0].tokens.new = empty;
        let refused = matches!(objective.evaluate(&answers), Err(ObjectiveError::Tokens { values: 0, .. }));
        prop_assert!(refused);
    }

    #[test]
    fn unusable_answers_are_refused(batch in batch(), objective in objective()) {
        let with = |change: fn(&mut Sample)| {
            let mut batch = batch.clone();
            change(&mut batch.0[1]);
            objective.evaluate(&batch.answers())
        };
        let not_finite = |result| matches!(result, Err(ObjectiveError::NotFinite { index: 1, token: 0, .. }));
        prop_assert!(not_finite(with(|sample| (sample.new[0], sample.info.truncated) = (f64::NAN, false))));
        let empty = with(|sample| sample.info.tokens = 0);
        prop_assert!(matches!(empty, Err(ObjectiveError::EmptyAnswer { index: 1, .. })), "{empty:?}");
        let reward = with(|sample| sample.info.reward = f64::INFINITY);
        prop_assert!(matches!(reward, Err(ObjectiveError::Reward { index: 1, .. })), "{reward:?}");
        prop_assert_eq!(objective.evaluate(&[]), Err(ObjectiveError::NoSequences));
        let alone = objective.evaluate(&batch.answers()[..1]);
        let compares = match objective {
            Objective::Pacs(config) => config.score.min_group_size() > 1,
            Objective::Policy(config) => config.advantage.compares_group(),
            Objective::Real(_) | Objective::Disco(_) | Objective::External => false,
        };
        if compares {
            let refused =
                matches!(alone, Err(ObjectiveError::LonelySample { .. } | ObjectiveError::GroupTooSmall { .. }));
            prop_assert!(refused, "{alone:?}");
        }
    }
}

#[test]
fn broken_settings_are_refused_by_name() {
    let batch = [(); 2].map(|()| sample(0, 1.0, false, &[(-1.0, 0.0, 0.0, 0.0)]));
    let batch = Batch(batch.to_vec());
    let broken: [(&str, PolicyConfig); 8] = [
        ("clip_low", PolicyConfig { clip: Clip { low: 1.5, ..grpo().clip }, ..grpo() }),
        ("clip_high", PolicyConfig { clip: Clip { high: -0.1, ..grpo().clip }, ..grpo() }),
        ("dual_clip", PolicyConfig { clip: Clip { dual: Some(1.0), ..grpo().clip }, ..grpo() }),
        ("the length of the aggregation", dr_grpo(0.0)),
        ("gamma", PolicyConfig { advantage: AdvantageEstimator::ReinforcePp { gamma: 1.5 }, ..grpo() }),
        ("lambda", PolicyConfig { advantage: AdvantageEstimator::Gae { gamma: 1.0, lambda: -1.0 }, ..ppo() }),
        ("importance_cap", PolicyConfig { importance: Some(importance(ImportanceLevel::Token, 0.5)), ..grpo() }),
        ("entropy", PolicyConfig { entropy: f64::NAN, ..grpo() }),
    ];
    for (expected, config) in broken {
        let refused = Objective::Policy(config).evaluate(&batch.answers()).unwrap_err();
        assert!(matches!(refused, ObjectiveError::Setting { name, .. } if name == expected), "{expected}: {refused}");
    }
}

#[test]
fn a_mini_batch_whose_answers_are_all_masked_has_no_gradient() {
    let batch =
        Batch(vec![sample(0, 1.0, true, &[(-1.0, 0.5, 0.0, 0.0)]), sample(0, 0.0, true, &[(-1.0, 0.5, 0.0, 0.0)])]);
    for config in [dapo(), PolicyConfig { mask_truncated: true, ..reinforce_pp() }] {
        let step = Objective::Policy(config).evaluate(&batch.answers()).unwrap();
        assert_eq!(step.loss, 0.0);
        assert!(step.sequences.iter().all(|sequence| sequence.dloss_dlogprob == [0.0]));
        assert_eq!(step.sequences[0].metrics.to_vec().iter().sum::<f64>(), 1.0, "counted as masked, nothing else");
    }
}

/// One pass rate and one exponent at a time: the weights that other objectives give a prompt, on policy.
#[test]
fn one_family_holds_the_first_updates_of_its_kin() {
    for right in 1..8 {
        let answer = |i| {
            let label = if i < right { 1.0 } else { 0.0 };
            sample(0, label, false, &[(-1.0 - f64::from(i) / 8.0, 0.0, 0.0, 0.0); 3])
        };
        let batch = Batch((0..8).map(answer).collect());
        let coefficients = |objective: Objective| -> Vec<f64> {
            let step = objective.evaluate(&batch.answers()).unwrap();
            step.sequences.iter().map(|sequence| sequence.dloss_dlogprob[0]).collect()
        };
        let of = |a: f64, b: f64| coefficients(Objective::Policy(weighted_rloo(a, b)));
        let (p, n) = (f64::from(right) / 8.0, 8.0f64);
        let pacs = PacsConfig { beta: 2.0, ..PacsConfig::paper() };
        let summed = |config: PolicyConfig| {
            Objective::Policy(PolicyConfig { aggregation: Aggregation::SeqMeanTokenSum, ..config })
        };
        let deviation = (p * (1.0 - p) * n / (n - 1.0)).sqrt();
        let epsilon = deviation / (deviation + 1e-6);
        for (what, kin, mine, scale) in [
            ("rloo", coefficients(Objective::Policy(rloo())), of(0.0, 0.0), 1.0),
            ("dr_grpo", coefficients(summed(dr_grpo(1.0))), of(0.0, 0.0), (n - 1.0) / n),
            ("maxrl", coefficients(Objective::Policy(maxrl())), of(1.0, 0.0), (n - 1.0) / n),
            ("grpo", coefficients(summed(grpo())), of(0.5, 0.5), epsilon * ((n - 1.0) / n).powf(1.5)),
            ("pacs", coefficients(Objective::Pacs(pacs)), of(1.0, 1.0), 2.0 / 4.0),
        ] {
            for (kin, mine) in kin.iter().zip(&mine) {
                assert!(close(*kin, scale * mine), "{what}, {right} of 8 right: {kin} is not {scale} x {mine}");
            }
        }
    }
}

/// What samples are shown with. The right answer has become more probable and the wrong one less.
#[test]
fn scores_are_what_verdicts_are_compared_with_and_coefficients_have_one_sign() {
    let batch = Batch(vec![
        sample(0, 1.0, false, &[(-1.0, 0.1, 0.0, 0.0), (-2.0, 0.05, 0.0, 0.0)]),
        sample(0, 0.0, false, &[(-1.0, -0.05, 0.0, 0.0)]),
    ]);
    let pacs = PacsConfig::paper();
    let undiscounted = AdvantageEstimator::ReinforcePp { gamma: 1.0 };
    let discounted = AdvantageEstimator::ReinforcePp { gamma: 0.5 };
    // Whitening: three tokens with returns of 1 or 0.5, 1 and 0.
    let whitened = |returns: [f64; 3]| {
        let mean = returns.iter().sum::<f64>() / 3.0;
        let deviation = (returns.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 2.0).sqrt();
        let [first, second, wrong] = returns.map(|value| (value - mean) / deviation);
        [(first + second) / 2.0, wrong]
    };
    let half = 0.5f64.sqrt();
    for (name, objective, scores) in [
        ("pacs", Objective::Pacs(pacs), [0.2, -0.2]),
        ("real", Objective::Real(RealConfig { tau: 0.5 }), [0.15, -0.1]),
        ("disco", Objective::Disco(DiscoConfig { tau: 10.0, delta: 1.0, penalty: 0.0 }), [-1.5, -1.0]),
        ("grpo", Objective::Policy(grpo()), [half, -half]),
        ("dr_grpo", Objective::Policy(dr_grpo(32.0)), [0.5, -0.5]),
        ("rloo", Objective::Policy(rloo()), [1.0, -1.0]),
        (
            "reinforce_pp",
            Objective::Policy(PolicyConfig { advantage: undiscounted, ..reinforce_pp() }),
            whitened([1.0, 1.0, 0.0]),
        ),
        (
            "reinforce_pp, discounted",
            Objective::Policy(PolicyConfig { advantage: discounted, ..reinforce_pp() }),
            whitened([0.5, 1.0, 0.0]),
        ),
    ] {
        let step = objective.evaluate(&batch.answers()).unwrap();
        for (sequence, score) in step.sequences.iter().zip(scores) {
            let seen = sequence.score.unwrap();
            assert!((seen - score).abs() < 2e-6, "{name}: the score is {seen}, not {score}");
        }
        let coefficients: Vec<f64> = step.sequences.iter().map(|sequence| sequence.coefficient()).collect();
        assert!(coefficients[0] > 0.0 && coefficients[1] < 0.0, "{name}: {coefficients:?}");
        let slopes = &step.sequences[0].dloss_dlogprob;
        assert!((coefficients[0] + (slopes[0] + slopes[1]) / 2.0).abs() < 1e-12, "{name}: {coefficients:?}");
    }
    // The derivative of the mean cross entropy by the log-prob sum, through both scores: 1 - sigmoid(0.2).
    let step = Objective::Pacs(pacs).evaluate(&batch.answers()).unwrap();
    let expected = 1.0 / (1.0 + 0.2f64.exp());
    for (sequence, expected) in step.sequences.iter().zip([expected, -expected]) {
        assert!((sequence.coefficient() - expected).abs() < 1e-12, "{}, not {expected}", sequence.coefficient());
    }
}

#[test]
fn an_entropy_bonus_rewards_entropy() {
    let batch = Batch(vec![
        sample(0, 1.0, false, &[(-1.0, 0.0, 0.0, 0.0); 3]),
        sample(0, 1.0, false, &[(-2.0, 0.0, 0.0, 0.0)]),
    ]);
    let step = Objective::Policy(PolicyConfig { entropy: 0.1, ..dapo() }).evaluate(&batch.answers()).unwrap();
    // Equal rewards leave only the bonus: a tenth of the mean entropy of four tokens, which are 1, 1, 1 and 2.
    assert!((step.loss + 0.1 * 1.25).abs() < 1e-8, "{}", step.loss);
    assert!(step.sequences.iter().all(|sequence| (sequence.dloss_dentropy + 0.1 / 4.0).abs() < 1e-8));
}

#[test]
fn the_value_model_may_be_warmed_up_alone() {
    let warm = ValueConfig { warmup_steps: 3, ..ppo().value.unwrap() };
    let config = PolicyConfig { value: Some(warm), ..ppo() };
    assert_eq!([1, 3, 4].map(|step| config.trains_policy(step)), [false, false, true]);
    assert!(grpo().trains_policy(1));
}

/// One of three ranks: it holds the tokens of its own answers only, and gathers what [`Needs`] says.
struct Part {
    loss: f64,
    derivatives: Vec<Vec<f64>>,
    metrics: ObjectiveMetrics,
}

impl Part {
    fn compute(objective: &Objective, batch: &Batch, ranks: &[usize], rank: usize) -> Self {
        let (needs, answers) = (objective.needs(), batch.answers());
        let infos: Vec<SequenceInfo> = answers.iter().map(|answer| answer.info).collect();
        let nothing = TokenData::default();
        let known = |i: usize, gathered: bool| if gathered { &answers[i].tokens } else { &nothing };
        let every = || 0..infos.len();
        let summaries: Vec<StepSummary> =
            every().map(|i| objective.summary(i, &infos[i], known(i, needs.summaries)).unwrap()).collect();
        let sums: Vec<LogprobSums> = every()
            .map(
                |i| if needs.sums { objective.sums(i, &infos[i], known(i, true)).unwrap() } else { Default::default() },
            )
            .collect();
        let baseline = objective.baseline(&infos, &summaries).unwrap();
        let state = objective.update(&infos, &sums).unwrap();
        let mut part = Self { loss: 0.0, derivatives: vec![Vec::new(); infos.len()], metrics: Default::default() };
        for i in every().filter(|&i| ranks[i] == rank) {
            let tokens = &answers[i].tokens;
            let advantages = objective.advantages(&baseline, i, &infos[i], tokens).unwrap();
            let outcome = objective.sequence(&state, i, &infos[i], &advantages, tokens).unwrap();
            part.loss += outcome.loss;
            part.metrics.merge(&outcome.metrics);
            part.derivatives[i] = outcome.dloss_dlogprob;
        }
        part
    }
}

/// Slope of `loss` as `shift` moves one number; `None` at a kink (clipping, absolute values), where the
/// one-sided slopes differ.
fn slope(
    objective: &Objective,
    batch: &Batch,
    shift: impl Fn(&mut Batch, f64),
    loss: impl Fn(&ObjectiveStep) -> f64,
) -> Option<f64> {
    let at = |distance: f64| {
        let mut batch = batch.clone();
        shift(&mut batch, distance);
        loss(&objective.evaluate(&batch.answers()).unwrap())
    };
    let distance = 1e-5;
    let (below, here, above) = (at(-distance), at(0.0), at(distance));
    let (left, right) = ((here - below) / distance, (above - here) / distance);
    ((left - right).abs() < 1e-3 * (1.0 + left.abs())).then_some((above - below) / (2.0 * distance))
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-10 * (1.0 + a.abs() + b.abs())
}

#[derive(Clone, Debug)]
struct Sample {
    info: SequenceInfo,
    new: Vec<f64>,
    old: Vec<f64>,
    rollout: Vec<f64>,
    reference: Vec<f64>,
    entropies: Vec<f64>,
    values: Vec<f64>,
    new_values: Vec<f64>,
}

#[derive(Clone, Debug)]
struct Batch(Vec<Sample>);

impl Batch {
    fn answers(&self) -> Vec<Answer<'_>> {
        self.0.iter().map(|sample| Answer { info: sample.info, tokens: sample.tokens() }).collect()
    }
}

impl Sample {
    fn tokens(&self) -> TokenData<'_> {
        TokenData {
            new: &self.new,
            old: &self.old,
            rollout: Some(&self.rollout),
            reference: Some(&self.reference),
            entropies: Some(&self.entropies),
            values: Some(&self.values),
            new_values: Some(&self.new_values),
        }
    }
}

/// Tokens are (new log-prob, new - old, old - rollout, old - reference).
fn sample(group: u64, reward: f64, truncated: bool, tokens: &[(f64, f64, f64, f64)]) -> Sample {
    let every = |number: fn(&(f64, f64, f64, f64)) -> f64| tokens.iter().map(number).collect::<Vec<f64>>();
    Sample {
        info: SequenceInfo {
            group,
            label: if reward > 0.5 { 1.0 } else { 0.0 },
            reward,
            greedy_reward: Some(0.4),
            tokens: tokens.len() as u32,
            truncated,
        },
        new: every(|token| token.0),
        old: every(|token| token.0 - token.1),
        rollout: every(|token| token.0 - token.1 - token.2),
        reference: every(|token| token.0 - token.1 - token.3),
        entropies: every(|token| -token.0),
        values: every(|token| token.1),
        new_values: every(|token| token.1 + token.2),
    }
}

/// One to four groups of two to five members, each group contiguous.
fn batch() -> impl Strategy<Value = Batch> {
    let token = (-5.0..-0.1f64, -1.0..1.0f64, -1.0..1.0f64, -1.0..1.0f64);
    let reward = prop::sample::select(vec![0.0, 0.0, 1.0, 1.0, 0.7]);
    let member = (reward, prop::bool::weighted(0.2), prop::collection::vec(token, 1..6));
    prop::collection::vec(prop::collection::vec(member, 2..6), 1..5).prop_map(|groups| {
        let members = groups.iter().enumerate().flat_map(|(group, members)| members.iter().map(move |m| (group, m)));
        Batch(members.map(|(group, (reward, truncated, t))| sample(group as u64, *reward, *truncated, t)).collect())
    })
}

fn batch_and_order() -> impl Strategy<Value = (Batch, Vec<usize>)> {
    batch().prop_flat_map(|batch| {
        let order: Vec<usize> = (0..batch.0.len()).collect();
        (Just(batch), Just(order).prop_shuffle())
    })
}

fn batch_on_ranks() -> impl Strategy<Value = (Batch, Vec<usize>)> {
    batch().prop_flat_map(|batch| {
        let ranks = prop::collection::vec(0usize..3, batch.0.len());
        (Just(batch), ranks)
    })
}

fn importance(level: ImportanceLevel, cap: f64) -> ImportanceWeights {
    ImportanceWeights { level, mode: ImportanceMode::Truncate, cap }
}

fn objective() -> impl Strategy<Value = Objective> {
    prop_oneof![
        2 => pacs_config().prop_map(Objective::Pacs),
        5 => policy_config().prop_map(Objective::Policy),
        1 => (0.2..3.0f64).prop_map(|tau| Objective::Real(RealConfig { tau })),
        1 => (0.5..20.0f64, 0.0..0.2f64, 0.0..10.0f64)
            .prop_map(|(tau, delta, penalty)| Objective::Disco(DiscoConfig { tau, delta, penalty })),
    ]
}

fn pacs_config() -> impl Strategy<Value = PacsConfig> {
    // The standardised score is too curved for finite differences where a group's proxies nearly coincide.
    let score = prop::sample::select(vec![ScoreEstimator::Rloo, ScoreEstimator::DrGrpo, ScoreEstimator::Naive]);
    let reward_method = prop::sample::select(vec![RewardMethod::LogRatio, RewardMethod::MeanLogprob]);
    let label_weights = prop::sample::select(vec![LabelWeights::None, LabelWeights::Question]);
    let level = prop::sample::select(vec![ImportanceLevel::Sequence, ImportanceLevel::Geometric]);
    let mode = prop::sample::select(vec![ImportanceMode::Truncate, ImportanceMode::Mask]);
    let importance = (level, mode, 1.0..3.0f64).prop_map(|(level, mode, cap)| ImportanceWeights { level, mode, cap });
    let settings = (0.1..3.0f64, score, reward_method, label_weights, prop::option::of(importance));
    // The actor term is not a derivative of the loss; a test of its own covers it.
    settings.prop_map(|(beta, score, reward_method, label_weights, importance)| PacsConfig {
        beta,
        score,
        reward_method,
        label_weights,
        actor_term: false,
        importance,
    })
}

/// The published settings, and everything that can be changed about them.
fn policy_config() -> impl Strategy<Value = PolicyConfig> {
    let published = prop::sample::select(vec![
        grpo(),
        dr_grpo(32.0),
        dapo(),
        gspo(),
        rloo(),
        reinforce_pp(),
        PolicyConfig { advantage: AdvantageEstimator::ReinforcePp { gamma: 0.9 }, ..reinforce_pp() },
        reinforce_pp_baseline(),
        remax(),
        weighted_rloo(1.0, 1.0),
        weighted_rloo(0.5, 2.0),
        maxrl(),
        cispo(),
        dppo(),
        ppo(),
        PolicyConfig { advantage: AdvantageEstimator::Gae { gamma: 0.99, lambda: 0.95 }, ..ppo() },
    ]);
    let aggregation = prop::sample::select(vec![
        None,
        Some(Aggregation::TokenMean),
        Some(Aggregation::SeqMeanTokenMean),
        Some(Aggregation::SeqMeanTokenSum),
        Some(Aggregation::TokenSumNorm { length: 7.0 }),
    ]);
    let kind = prop::sample::select(vec![KlKind::K1, KlKind::Abs, KlKind::K2, KlKind::K3]);
    let place = prop::sample::select(vec![KlPlace::Loss, KlPlace::Reward]);
    let kl = prop::option::of((0.01..0.5f64, kind, place).prop_map(|(coefficient, kind, place)| KlPenalty {
        coefficient,
        kind,
        place,
    }));
    let level =
        prop::sample::select(vec![ImportanceLevel::Token, ImportanceLevel::Sequence, ImportanceLevel::Geometric]);
    let mode = prop::sample::select(vec![ImportanceMode::Truncate, ImportanceMode::Mask]);
    let importance = prop::option::of((level, mode, 1.0..3.0f64).prop_map(|(level, mode, cap)| ImportanceWeights {
        level,
        mode,
        cap,
    }));
    let entropy = prop::sample::select(vec![0.0, 0.01]);
    (published, aggregation, kl, importance, entropy).prop_map(|(config, aggregation, kl, importance, entropy)| {
        PolicyConfig { aggregation: aggregation.unwrap_or(config.aggregation), kl, importance, entropy, ..config }
    })
}
