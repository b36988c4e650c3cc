//! Invariance of the update under ranks and passes, for every objective.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pacs_algo::{
    AdvantageEstimator, Clip, ImportanceLevel, ImportanceMode, ImportanceWeights, KlKind, KlPenalty, KlPlace,
    Objective, PacsConfig, PolicyConfig, ValueConfig, cispo, dapo, disco, dppo, dr_grpo, grpo, gspo, maxrl, ppo, real,
    reinforce_pp, reinforce_pp_baseline, rloo, weighted_rloo,
};
use pacs_collective::HostCollective;
use pacs_learner::{ExternalSettings, TrainBatch, Trainer, TrainerSettings};
use pacs_shape::Division;
use pacs_torch::tch::{Device, Kind, Tensor};

use crate::support::{
    GROUP_SIZE, GROUPS, PACS, assert_close, descent, golden, on_ranks, settings, share, weights, whole_batch,
};

const STEPS: u64 = 5;

fn trainer(model: &str, settings: TrainerSettings) -> Trainer {
    crate::support::trainer(&golden(model), settings, Kind::Float)
}

/// The weights of a trainer whose state is replicated.
fn flat(trainer: &mut Trainer) -> Tensor {
    weights(trainer, &mut HostCollective::alone())
}

/// Weights after [`STEPS`] steps on `ranks` ranks. Checks that all ranks end with the same bits.
fn train(model: &str, ranks: usize, mini_batches: usize, settings: &TrainerSettings) -> Tensor {
    train_and_report(model, ranks, mini_batches, settings).0
}

/// As [`train`], with the metrics of the last step.
fn train_and_report(
    model: &str,
    ranks: usize,
    mini_batches: usize,
    settings: &TrainerSettings,
) -> (Tensor, BTreeMap<String, f64>) {
    let ranks: Vec<(Tensor, BTreeMap<String, f64>)> = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let mut trainer = trainer(model, TrainerSettings { division, ..settings.clone() });
        let mut metrics = BTreeMap::new();
        for step in 1..=STEPS {
            let batch = share(whole_batch(step, mini_batches), rank, ranks);
            metrics = trainer.train(&batch, collective).expect("trains").metrics;
        }
        let own = |name: &str| {
            ["seconds_", "memory_", "communication_", "slowest_rank", "other_ranks_"]
                .iter()
                .any(|own| name.starts_with(own))
        };
        metrics.retain(|name, _| !own(name) && !name.ends_with("_per_second"));
        (weights(&mut trainer, collective), metrics)
    });
    for (weights, metrics) in &ranks[1..] {
        assert!(ranks[0].0.equal(weights), "the ranks hold different weights");
        assert_eq!(&ranks[0].1, metrics, "the ranks report different metrics");
    }
    ranks.into_iter().next().expect("there is a rank")
}

#[test]
fn more_ranks_give_the_same_weights_as_one() {
    for mini_batches in [1, 3] {
        let reference = train("qwen3", 1, mini_batches, &settings());
        assert!((&reference - &flat(&mut trainer("qwen3", settings()))).abs().max().double_value(&[]) > 5e-5);
        for ranks in [2, 3, 4] {
            let weights = train("qwen3", ranks, mini_batches, &settings());
            assert_close(&weights, &reference, 1e-5, &format!("{ranks} ranks, {mini_batches} mini-batches"));
        }
    }
}

#[test]
fn smaller_passes_give_the_same_weights() {
    for model in ["qwen2-untied", "llama3"] {
        let reference = train(model, 1, 2, &settings());
        let small = TrainerSettings { micro_batch_tokens: 30, ..settings() };
        assert_close(&train(model, 1, 2, &small), &reference, 1e-5, model);
    }
}

#[test]
fn a_reference_that_lives_for_several_steps_counts() {
    let long = TrainerSettings { reference_reset_steps: 3, ..settings() };
    let reference = train("qwen3", 1, 2, &long);
    assert_close(&train("qwen3", 2, 2, &long), &reference, 1e-5, "two ranks");
    let short = train("qwen3", 1, 2, &settings());
    assert!((&short - &reference).abs().max().double_value(&[]) > 1e-6, "the reset period changes nothing");
}

/// Every objective with settings that couple its answers, and a metric that shows the coupling.
fn objectives() -> Vec<(&'static str, PolicyConfig, &'static str)> {
    let clip = Clip { low: 0.02, high: 0.02, dual: Some(1.5) };
    let kl = |place| Some(KlPenalty { coefficient: 0.1, kind: KlKind::K3, place });
    let importance =
        Some(ImportanceWeights { level: ImportanceLevel::Token, mode: ImportanceMode::Truncate, cap: 1.2 });
    let discounted = AdvantageEstimator::ReinforcePp { gamma: 0.9 };
    let estimated = AdvantageEstimator::Gae { gamma: 0.99, lambda: 0.9 };
    let values = |clip| ppo().value.map(|value| ValueConfig { clip, ..value });
    let everything = PolicyConfig {
        advantage: estimated,
        kl: kl(KlPlace::Reward),
        importance,
        entropy: 0.1,
        mask_truncated: true,
        value: values(0.5).map(|value| ValueConfig { warmup_steps: 2, ..value }),
        ..ppo()
    };
    vec![
        ("grpo", PolicyConfig { clip, ..grpo() }, "ratio_clipped_share"),
        ("dr_grpo", dr_grpo(12.0), "advantage_std"),
        ("dapo", PolicyConfig { clip, ..dapo() }, "masked_sequences"),
        ("gspo", PolicyConfig { clip: Clip { low: 0.003, high: 0.004, dual: None }, ..gspo() }, "ratio_clipped_share"),
        ("rloo", rloo(), "policy_kl_k3"),
        ("reinforce_pp", PolicyConfig { advantage: discounted, ..reinforce_pp() }, "advantage_mean"),
        ("reinforce_pp_baseline", reinforce_pp_baseline(), "advantage_std"),
        ("grpo with weights", PolicyConfig { importance, ..grpo() }, "importance_cut_share"),
        ("grpo with a penalty", PolicyConfig { kl: kl(KlPlace::Loss), ..grpo() }, "reference_kl"),
        ("reinforce_pp with a penalty", PolicyConfig { kl: kl(KlPlace::Reward), ..reinforce_pp() }, "reference_kl"),
        ("rloo with a penalty", PolicyConfig { kl: kl(KlPlace::Reward), ..rloo() }, "reference_kl"),
        ("grpo with a bonus", PolicyConfig { entropy: 0.5, ..grpo() }, "policy_kl_k3"),
        ("weighted_rloo", weighted_rloo(0.5, 1.5), "policy_kl_k3"),
        ("maxrl", maxrl(), "advantage_std"),
        ("cispo", PolicyConfig { clip: Clip { low: 0.02, high: 0.02, dual: None }, ..cispo() }, "ratio_clipped_share"),
        ("dppo", dppo(), "policy_kl_k3"),
        ("ppo", PolicyConfig { advantage: estimated, value: values(0.05), ..ppo() }, "value_clipped_share"),
        ("ppo with everything", everything, "value_explained_variance"),
    ]
}

/// Settings that move far enough in a step for ratios to be clipped.
fn far(objective: PolicyConfig) -> TrainerSettings {
    let objective = Objective::Policy(objective);
    TrainerSettings { objective, reference_reset_steps: 0, critic_learning_rate: 0.05, ..descent() }
}

#[test]
fn every_objective_is_exact_under_ranks_and_passes() {
    for (name, objective, telling) in objectives() {
        let settings = far(objective);
        let (reference, metrics) = train_and_report("qwen3", 1, 3, &settings);
        assert!(metrics[telling] != 0.0, "{name}: nothing shows in {telling}");
        assert!((&reference - flat(&mut trainer("qwen3", settings.clone()))).abs().max().double_value(&[]) > 1e-3);
        let small = TrainerSettings { micro_batch_tokens: 30, ..settings.clone() };
        for (ranks, settings) in [(3, &settings), (2, &small)] {
            let (weights, seen) = train_and_report("qwen3", ranks, 3, settings);
            assert_close(&weights, &reference, 2e-6, &format!("{name}, {ranks} ranks"));
            for (metric, value) in metrics.iter().filter(|(metric, _)| of_objective(metric)) {
                let close = (seen[metric] - value).abs() <= 1e-4 * (1.0 + value.abs());
                assert!(close, "{name}, {ranks} ranks: {metric} is {}, not {value}", seen[metric]);
            }
        }
    }
}

/// Whether a metric is the objective's own. The others depend on which answers had a forward, and so on the passes.
fn of_objective(metric: &str) -> bool {
    let prefixes = [
        "loss",
        "grad_norm",
        "ratio_",
        "policy_kl",
        "advantage_",
        "masked_",
        "importance_",
        "reference_kl",
        "value_",
        "return_",
    ];
    prefixes.iter().any(|prefix| metric.starts_with(prefix))
}

/// Objectives that couple answers by their log-probs, among them an external program.
#[test]
fn objectives_of_whole_answers_are_exact_under_ranks_and_passes() {
    // The rollout log-probs of these batches are invented and far from the model's, so the mask has to be wide
    // to keep any.
    let importance = |mode, cap| Some(ImportanceWeights { level: ImportanceLevel::Geometric, mode, cap });
    let (truncated, masked) = (importance(ImportanceMode::Truncate, 1.5), importance(ImportanceMode::Mask, 1e4));
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/objectives/pairwise.py");
    let command = vec!["python3".to_owned(), example.display().to_string(), "2.0".to_owned()];
    let external = ExternalSettings { command, timeout: Duration::from_secs(60) };
    let has_python = Command::new("python3").arg("--version").output().is_ok();
    if !has_python {
        eprintln!("skipped: the objective that is a program, for there is no python3");
    }
    for (name, objective) in [
        ("pacs with weights", Objective::Pacs(PacsConfig { importance: truncated, ..PACS })),
        ("pacs with a mask", Objective::Pacs(PacsConfig { importance: masked, ..PACS })),
        ("real", Objective::Real(real())),
        ("disco", Objective::Disco(disco())),
        ("external", Objective::External),
    ] {
        if objective == Objective::External && !has_python {
            continue;
        }
        let settings = TrainerSettings { objective, external: Some(external.clone()), ..descent() };
        let (reference, metrics) = train_and_report("qwen3", 1, 3, &settings);
        assert!(metrics["log_ratio_abs_mean"] > 0.0, "{name}: {metrics:?}");
        assert!(
            (&reference - flat(&mut trainer("qwen3", settings.clone()))).abs().max().double_value(&[]) > 1e-4,
            "{name}"
        );
        let small = TrainerSettings { micro_batch_tokens: 30, ..settings.clone() };
        for (ranks, settings) in [(3, &settings), (2, &small)] {
            let weights = train("qwen3", ranks, 3, settings);
            assert_close(&weights, &reference, 5e-6, &format!("{name}, {ranks} ranks"));
        }
    }
}

#[test]
fn a_penalty_holds_the_policy_near_its_reference() {
    let kl = KlPenalty { coefficient: 5.0, kind: KlKind::K2, place: KlPlace::Loss };
    let [free, held] = [None, Some(kl)].map(|kl| {
        let settings = far(PolicyConfig { kl, ..grpo() });
        let weights = train("qwen3", 1, 2, &settings);
        (weights - flat(&mut trainer("qwen3", settings))).norm().double_value(&[])
    });
    assert!(held < 0.9 * free, "moved {held} with a penalty, {free} without");
}

#[test]
fn the_first_update_equals_plain_sequences() {
    let batch = whole_batch(1, 1);
    let mut ours = trainer("qwen2-tied", settings());
    ours.settings_mut().optimizer.max_grad_norm = 0.0;
    let report = ours.train(&batch, &mut HostCollective::alone()).expect("trains");
    let norm = plain::gradient_norm(&golden("qwen2-tied"), &batch, settings().temperature);
    let seen = report.metrics["grad_norm"];
    assert!((seen / norm - 1.0).abs() < 1e-4, "gradient norm {seen}, plain sequences say {norm}");
    assert!((report.metrics["loss"] - std::f64::consts::LN_2).abs() < 1e-9, "on policy every score is zero");
}

#[test]
fn coefficients_of_tokens_equal_those_of_plain_sequences() {
    let gamma = 0.8;
    let objective = PolicyConfig { advantage: AdvantageEstimator::ReinforcePp { gamma }, ..reinforce_pp() };
    let weights = ImportanceWeights { level: ImportanceLevel::Token, mode: ImportanceMode::Truncate, cap: 1000.0 };
    let batch = whole_batch(1, 1);
    // With importance weights, coefficients need a forward; without, they are known before it.
    for importance in [None, Some(weights)] {
        let mut ours = trainer("qwen2-tied", far(PolicyConfig { importance, ..objective }));
        ours.settings_mut().optimizer.max_grad_norm = 0.0;
        let report = ours.train(&batch, &mut HostCollective::alone()).expect("trains");
        let folder = golden("qwen2-tied");
        let norm = plain::reinforce_norm(&folder, &batch, settings().temperature, gamma, importance.is_some());
        let seen = report.metrics["grad_norm"];
        assert!((seen / norm - 1.0).abs() < 1e-4, "gradient norm {seen}, plain sequences say {norm}");
    }
}

/// The same losses written plainly: one sequence at a time, nothing shared and nothing packed.
mod plain {
    use super::*;
    use pacs_model::attention::{Packed, PackedRow, packed_positions};
    use pacs_model::logprob::{Targets, head_backward};
    use pacs_model::{Keep, Model, ModelConfig, Parameters};

    fn model(folder: &Path) -> Model {
        let config = ModelConfig::read(folder).expect("golden model");
        let parameters = Parameters::load(folder, &config, Kind::Float, Device::Cpu).expect("golden model");
        Model::new(&config, &parameters)
    }

    /// Norm of the gradient of PACS (RLOO, question weights, beta 1) at old = new.
    pub(super) fn gradient_norm(folder: &Path, batch: &TrainBatch, temperature: f64) -> f64 {
        let model = model(folder);
        let ratios = Tensor::zeros([batch.index.len() as i64], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let mut losses = Vec::new();
        for group in 0..GROUPS {
            let members: Vec<usize> = (0..batch.index.len()).filter(|i| batch.index[*i].group == group).collect();
            let positive = members.iter().filter(|i| batch.index[**i].label > 0.5).count();
            for i in &members {
                let others: Tensor = members.iter().filter(|j| *j != i).map(|j| ratios.get(*j as i64)).sum();
                let score = ratios.get(*i as i64) - others / (GROUP_SIZE as f64 - 1.0);
                let label = batch.index[*i].label;
                let same = if label > 0.5 { positive } else { GROUP_SIZE - positive };
                let mixed = positive != 0 && positive != GROUP_SIZE;
                let weight = if mixed { GROUP_SIZE as f64 / (2.0 * same as f64) } else { 1.0 };
                let sign = if label > 0.5 { 1.0 } else { -1.0 };
                losses.push((score * sign).log_sigmoid() * -weight);
            }
        }
        (Tensor::stack(&losses, 0).sum(Kind::Double) / losses.len() as f64).backward();
        let coefficients = Vec::<f64>::try_from(ratios.grad()).expect("a vector");
        let gradients = model.zero_gradients();
        for (sequence, coefficient) in batch.sequences.iter().zip(coefficients) {
            let prompt = &batch.prompts[&batch.index[sequence.position].group];
            let coefficients = vec![coefficient as f32; sequence.tokens.len()];
            add_gradient(&model, prompt, &sequence.tokens, &coefficients, temperature, &gradients);
        }
        gradients.square().sum(Kind::Double).sqrt().double_value(&[])
    }

    /// Norm of the gradient of the mean over all tokens of minus whitened discounted return times log-prob. If
    /// `weighted`, each token is weighted by the ratio of learner to rollout probability.
    pub(super) fn reinforce_norm(
        folder: &Path,
        batch: &TrainBatch,
        temperature: f64,
        gamma: f64,
        weighted: bool,
    ) -> f64 {
        let model = model(folder);
        let mut returns = Vec::new();
        for entry in &batch.index {
            returns.extend((0..entry.answer_tokens).rev().map(|to_go| entry.reward * gamma.powi(to_go as i32)));
        }
        let returns = Tensor::from_slice(&returns);
        let advantages = (&returns - returns.mean(Kind::Double)) / returns.std(true);
        let mut advantages = Vec::<f64>::try_from(advantages).expect("a vector").into_iter();
        let tokens = advantages.len() as f64;
        let gradients = model.zero_gradients();
        for sequence in &batch.sequences {
            let prompt = &batch.prompts[&batch.index[sequence.position].group];
            let items = vec![(prompt.clone(), sequence.tokens.clone())];
            let logprobs = pacs_model::score(&model, items, temperature, 1).expect("known tokens").remove(0);
            let weights =
                logprobs.iter().zip(sequence.behaviour_logprobs()).map(|(ours, theirs)| (ours - theirs).exp());
            let coefficients: Vec<f32> = weights
                .zip(&mut advantages)
                .map(|(weight, advantage)| -(advantage / tokens) as f32 * if weighted { weight } else { 1.0 })
                .collect();
            add_gradient(&model, prompt, &sequence.tokens, &coefficients, temperature, &gradients);
        }
        gradients.square().sum(Kind::Double).sqrt().double_value(&[])
    }

    /// Adds the gradient of one answer's log-probs, times `coefficients`.
    fn add_gradient(
        model: &Model,
        prompt: &[u32],
        answer: &[u32],
        coefficients: &[f32],
        temperature: f64,
        gradients: &Tensor,
    ) {
        let tokens: Vec<i64> = prompt.iter().chain(answer).map(|token| i64::from(*token)).collect();
        let rows = [PackedRow { prompt_len: tokens.len(), answer_lens: Vec::new() }];
        let positions = Tensor::from_slice(&packed_positions(&rows));
        let trace = model.forward(&Tensor::from_slice(&tokens), &positions, Packed::new(&rows, model), Keep::All);
        let (start, length) = (prompt.len() as i64 - 1, answer.len() as i64);
        let targets = Targets { tokens: &tokens[prompt.len()..], coefficients, entropy_coefficients: &[], temperature };
        let head = head_backward(model, &trace.hidden().narrow(0, start, length), targets, 7, gradients);
        let by_hidden = trace.hidden().zeros_like();
        by_hidden.narrow(0, start, length).copy_(&head.by_hidden);
        model.backward(trace, &by_hidden, gradients);
    }
}

#[test]
fn a_restored_trainer_is_bit_identical() {
    let long = TrainerSettings { reference_reset_steps: 2, ..settings() };
    let kl = Some(KlPenalty { coefficient: 0.1, kind: KlKind::K3, place: KlPlace::Loss });
    let penalised = far(PolicyConfig { kl, ..grpo() });
    let valued = far(ppo());
    for (kind, settings) in [
        (Kind::Float, &long),
        (Kind::BFloat16, &long),
        (Kind::Float, &penalised),
        (Kind::Float, &valued),
        (Kind::BFloat16, &valued),
    ] {
        restores_bit_for_bit(kind, settings);
    }
}

fn restores_bit_for_bit(kind: Kind, long: &TrainerSettings) {
    let load = || crate::support::trainer(&golden("qwen3"), long.clone(), kind);
    let mut collective = HostCollective::alone();
    let mut whole = load();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for step in 1..=STEPS {
        whole.train(&whole_batch(step, 2), &mut collective).expect("trains");
        if step == 3 {
            let files = whole.save(folder.path(), true, None, &mut collective).expect("saves");
            assert_eq!(files.len(), 1 + usize::from(long.objective.needs().values));
        }
    }
    let mut resumed = load();
    resumed.restore(folder.path()).expect("restores");
    for step in 4..=STEPS {
        resumed.train(&whole_batch(step, 2), &mut collective).expect("trains");
    }
    assert!(flat(&mut whole).equal(&flat(&mut resumed)), "the resumed {kind:?} weights differ");
}

#[test]
fn log_probs_are_compared_where_one_version_has_made_both() {
    let compared = |mini_batches: usize, objective: Objective, stale: fn(usize) -> bool| {
        let mut batch = whole_batch(5, mini_batches);
        for (place, sequence) in batch.sequences.iter_mut().enumerate().filter(|(place, _)| stale(*place)) {
            // Older weights gave them much lower probabilities: an effect of training, and no mismatch of engines.
            (sequence.version, sequence.rollout_logprobs) = (3, vec![-90.0 - place as f32; sequence.tokens.len()]);
        }
        let mut trainer = trainer("qwen3", TrainerSettings { objective, ..settings() });
        trainer.train(&batch, &mut HostCollective::alone()).expect("trains").metrics
    };
    for mini_batches in [1, 3] {
        for objective in [Objective::Pacs(PACS), Objective::Policy(grpo())] {
            let some = compared(mini_batches, objective, |place| place % 3 != 0);
            assert!(some["logprob_mismatch_max"] > 0.0 && some["logprob_mismatch_max"] < 40.0, "{some:?}");
            let none = compared(mini_batches, objective, |_| true);
            let named = |name: &&String| name.starts_with("logprob_mismatch");
            assert_eq!(none.keys().filter(named).count(), 0, "nothing was compared, and nothing is said");
        }
    }
}

#[test]
fn a_job_of_long_sequences_trains_by_the_second_list_of_a_longrope() {
    let copy = tempfile::tempdir().expect("a temporary folder");
    let original = golden("phi3");
    std::fs::copy(original.join("model.safetensors"), copy.path().join("model.safetensors")).expect("copied");
    let config = std::fs::read_to_string(original.join("config.json")).expect("golden model");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("golden model");
    config["rope_scaling"]["short_factor"] = config["rope_scaling"]["long_factor"].clone();
    std::fs::write(copy.path().join("config.json"), config.to_string()).expect("written");
    let trained = |folder: &Path, longest_sequence| {
        let settings = TrainerSettings { longest_sequence, ..descent() };
        let mut trainer = crate::support::trainer(folder, settings, Kind::Float);
        trainer.train(&whole_batch(1, 1), &mut HostCollective::alone()).expect("trains");
        flat(&mut trainer)
    };
    let long = trained(&original, 257);
    assert!(long.equal(&trained(copy.path(), 256)), "the sequences are short, and rotated by the second list");
    assert!(!long.equal(&trained(&original, 256)), "the lists do not differ");
}

#[test]
fn a_truncated_state_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut trainer = trainer("qwen3", settings());
    trainer.save(folder.path(), true, None, &mut HostCollective::alone()).expect("saves");
    let path = folder.path().join("training-state.safetensors");
    let bytes = std::fs::read(&path).expect("just written");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("writes");
    let error = trainer.restore(folder.path()).expect_err("half a file").to_string();
    assert!(error.contains("training-state.safetensors"), "{error}");
}

#[test]
fn a_gradient_that_is_not_finite_is_skipped_and_counted() {
    let mut trainer = trainer("qwen3", settings());
    let before = flat(&mut trainer);
    // A huge scale overflows the float32 gradient.
    trainer.settings_mut().objective = Objective::Pacs(PacsConfig { beta: 1e45, ..PACS });
    let report = trainer.train(&whole_batch(1, 1), &mut HostCollective::alone()).expect("trains");
    assert_eq!(report.skipped_updates, 1);
    assert!(flat(&mut trainer).equal(&before), "a skipped update changed the weights");
}
