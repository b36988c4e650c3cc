//! The job spec as types: the doc comment of a field is its meaning, default and range.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pacs_algo::Schedule;
use pacs_shape::Sharding;
use serde::{Deserialize, Serialize};

use crate::{
    AsynchronySpec, EvaluationSetSpec, GeneratorSpec, GroupsSpec, LoraSpec, ObjectiveSpec, RewardSpec,
    RolloutEngineKind, VerifierSpec, VllmSpec, WatchdogSpec,
};

/// A training job: everything that decides what is trained, on what, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Name of the job: letters, digits, `-` and `_`, at most 64. Required.
    pub name: String,
    /// Seed of data order and sampling noise. Default 1, at most 2^63 - 1 (the largest integer of TOML).
    #[serde(default = "one")]
    pub seed: u64,
    /// The model that is trained. Required.
    pub model: ModelSpec,
    /// Problems to train on and to evaluate with. Required.
    pub data: DataSpec,
    /// How answers are sampled.
    #[serde(default)]
    pub rollout: RolloutSpec,
    /// What is optimised.
    #[serde(default)]
    pub objective: ObjectiveSpec,
    /// How it is optimised.
    #[serde(default)]
    pub optimizer: OptimizerSpec,
    /// How much goes into a step.
    #[serde(default)]
    pub batch: BatchSpec,
    /// How far generation may run ahead of training.
    #[serde(default)]
    pub asynchrony: AsynchronySpec,
    /// What happens to groups without signal, and to groups that are not completed.
    #[serde(default)]
    pub groups: GroupsSpec,
    /// When a run counts as stuck, and what is tried then.
    #[serde(default)]
    pub watchdog: WatchdogSpec,
    /// How answers are graded.
    #[serde(default)]
    pub verifier: VerifierSpec,
    /// Further verifiers, which sets of problems and rows name (`data.train.verifier`). Names are 1 to 32 letters, digits, `-` and `_`; at
    /// most 16.
    #[serde(default)]
    pub verifiers: BTreeMap<String, VerifierSpec>,
    /// What the reward is made of.
    #[serde(default)]
    pub reward: RewardSpec,
    /// When and how the policy is measured on held-out problems.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// When state is saved.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// What is recorded.
    #[serde(default)]
    pub logging: LoggingSpec,
    /// How many workers, on what.
    #[serde(default)]
    pub resources: ResourcesSpec,
}

fn one() -> u64 {
    1
}

/// The model that is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Hugging Face folder (config.json, *.safetensors, tokenizer.json), relative to the working directory. Where there is no such
    /// folder, `owner/name` or `owner/name@revision` is a model of the Hugging Face hub; `hf://owner/name` always is. Required.
    pub path: PathBuf,
    /// Kind that forward and backward compute in. Default `auto`: bfloat16 where the hardware multiplies it, else float32.
    #[serde(default)]
    pub precision: Precision,
    /// Variables passed to the chat template, for example `enable_thinking = false`. Default none.
    #[serde(default)]
    pub template_variables: toml::Table,
    /// Chat template (Jinja text) that takes the place of the model folder's. Default: the model folder's.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// Adapters (LoRA) that are trained in place of the model. Default: none, all weights are trained.
    #[serde(default)]
    pub lora: Option<LoraSpec>,
}

/// Kind that a model computes in. Master weights and moments are float32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bfloat16 where the hardware multiplies it, else float32.
    #[default]
    Auto,
    /// 32-bit floating point.
    Float32,
    /// Brain floating point, 16 bits.
    Bfloat16,
}

/// Problems to train on and to evaluate with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// Problems to train on. Required.
    pub train: SourceSpec,
    /// Further sets of problems to train on, by a name of the job's own: up to 31 tables like `data.train`. A step draws from
    /// each set in proportion to its `weight`, and each set has epochs of its own. Default none.
    #[serde(default)]
    pub mix: BTreeMap<String, SourceSpec>,
    /// Held-out problems; required when evaluation is on.
    #[serde(default)]
    pub evaluation: Option<SourceSpec>,
    /// Text after every question, the last message of a conversation included. Default: the paper's, ` Please reason step by step, and put your final answer
    /// within \boxed{}.`
    #[serde(default = "paper_suffix")]
    pub prompt_suffix: String,
    /// System message of questions and of conversations that have none; default none (the chat template may bring its own).
    #[serde(default)]
    pub system: Option<String>,
    /// Prompts with more tokens are left out and counted, and so are those that leave the model no room for
    /// `rollout.max_new_tokens`. Default 1024, 1 to 1,000,000.
    #[serde(default = "max_prompt_tokens")]
    pub max_prompt_tokens: usize,
    /// Shuffle the training problems anew each epoch. Default true.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// A problem is retired, and no longer drawn, after this many groups in a row with only right answers. When fewer
    /// problems are left than a step takes, the retired ones are reopened until they are solved as often again.
    /// Default: none is retired; 1 to 1000. A resumed job may change it.
    #[serde(default)]
    pub retire_after: Option<u32>,
    /// Draw problems by their signal: one with the pass rate `p` is drawn with the probability `4 p (1 - p)`, but at
    /// least with this one. The pass rate starts at 1/2 and moves half of the way to that of each new group; problems
    /// that were never drawn are always taken. Draws that are skipped cost nothing. Default: all problems alike; 0.01
    /// to below 1. A resumed job may change it.
    #[serde(default)]
    pub difficulty_floor: Option<f64>,
}

/// The suffix of the paper's prompts.
pub const PAPER_SUFFIX: &str = " Please reason step by step, and put your final answer within \\boxed{}.";

fn paper_suffix() -> String {
    PAPER_SUFFIX.to_owned()
}

fn max_prompt_tokens() -> usize {
    1024
}

fn yes() -> bool {
    true
}

/// One set of problems: exactly one of `path` and `generator`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// A `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file; all but the last may be packed (`.gz`, `.zst`). A `*` in the name of
    /// the file takes all that match, in the order of their names. `hf://datasets/owner/name[@revision]/…` is a data set of the Hugging
    /// Face hub, followed by a file, such a pattern, or `config/split`.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// A built-in generator of problems.
    #[serde(default)]
    pub generator: Option<GeneratorSpec>,
    /// Field that holds the question: a text, or a list of messages that ends with the user's; a dot leads into an object.
    /// Default `question`, else the first of `problem`, `prompt`, `messages`, `query`, `instruction`, `input` that is there. Files
    /// only.
    #[serde(default = "question")]
    pub question_field: String,
    /// Field that holds the reference answer: a text or a number; a dot leads into an object. Default `answer`, else the first of
    /// `final_answer`, `expected_answer`, `ground_truth`, `reward_model.ground_truth`, `reference_answer`, `target`, `solution`,
    /// `response` that is there. Files only.
    #[serde(default = "answer")]
    pub answer_field: String,
    /// Leave out the first so many problems. Default: none.
    #[serde(default)]
    pub skip: Option<usize>,
    /// Take only the first so many problems (after those skipped), at least 1. Default: all.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Share of the prompts that are drawn from this set, relative to the other weights. For `data.train` and `data.mix`
    /// where there is a `data.mix`. Default 1, above 0, at most 1,000,000.
    #[serde(default)]
    pub weight: Option<f64>,
    /// Text after every question of this set. Default: `data.prompt_suffix`.
    #[serde(default)]
    pub prompt_suffix: Option<String>,
    /// Who grades answers to these problems: the name of a table of `[verifiers]`, or a built-in kind with its defaults (`math`, `exact`,
    /// `countdown`, `code`). Default: `[verifier]`.
    #[serde(default)]
    pub verifier: Option<String>,
    /// Field that names the verifier of a row, in place of `verifier`; rows without it have that one. Default none. Files only.
    #[serde(default)]
    pub verifier_field: Option<String>,
}

impl DataSpec {
    /// Keys that a job may change between two runs of it: what was drawn is remembered, and what is drawn next is decided
    /// anew.
    pub const FREE: [&str; 2] = ["data.retire_after", "data.difficulty_floor"];

    /// The sets of problems to train on, with their paths in the spec: `data.train`, then those of `data.mix` by name.
    pub fn train_sets(&self) -> impl Iterator<Item = (String, &SourceSpec)> {
        let mixed = self.mix.iter().map(|(name, source)| (format!("data.mix.{name}"), source));
        std::iter::once(("data.train".to_owned(), &self.train)).chain(mixed)
    }

    /// All sources of the job but those of `evaluation.sets`.
    pub fn sources(&self) -> impl Iterator<Item = &SourceSpec> {
        std::iter::once(&self.train).chain(self.mix.values()).chain(&self.evaluation)
    }
}

impl Default for SourceSpec {
    fn default() -> Self {
        Self {
            path: None,
            generator: None,
            question_field: question(),
            answer_field: answer(),
            skip: None,
            limit: None,
            weight: None,
            prompt_suffix: None,
            verifier: None,
            verifier_field: None,
        }
    }
}

fn question() -> String {
    "question".to_owned()
}

fn answer() -> String {
    "answer".to_owned()
}

/// How answers are sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RolloutSpec {
    /// What generates the samples. Default `native`.
    pub engine: RolloutEngineKind,
    /// Samples per prompt, `n`. Default 8, 1 to 1024 (objectives that compare the samples of a prompt need 2).
    pub samples_per_prompt: u32,
    /// Most tokens of an answer. Default 8192, 1 to 1,000,000, and so few that a sample fits into a message: 838,860, or
    /// 662,258 where `top_p`, `top_k` or `min_p` cut something off.
    pub max_new_tokens: u32,
    /// Sampling temperature. Default 1.0, 0.01 to 10.
    pub temperature: f64,
    /// Nucleus: smallest set of tokens with this probability. Default 1.0 (off), above 0, at most 1.
    pub top_p: f64,
    /// Only the k most probable tokens. Default 0 (off), at most 1,000,000.
    pub top_k: u32,
    /// Only tokens with at least this share of the most probable token's probability. Default 0.0 (off), 0 to below 1;
    /// refused where `top_k` = 1 leaves it without effect.
    pub min_p: f64,
    /// Strings that end an answer, besides the model's end tokens; they may be or contain control tokens (`<|im_end|>`). At most
    /// 64, none empty. Default none.
    pub stop: Vec<String>,
    /// Samples that one rollout worker generates at once, over all its servers with `engine = "vllm"`. Default 256, up to 65536;
    /// room for one group at least.
    pub max_concurrent_samples: u32,
    /// Tokens that the KV cache of one rollout worker holds; a prompt counts once for all its samples. When it is full,
    /// the youngest sample is preempted and recomputed. Default 0: `max_concurrent_samples` of the longest prompt and
    /// answer, or what fits into 40 % of the host's memory. At least one longest prompt and answer, at most
    /// 1,000,000,000.
    pub cache_tokens: u64,
    /// What computes: `auto` (default), the fastest available, which is fused kernels on a CPU as on a GPU, or
    /// `reference`, libtorch's own operations on one sequence at a time: slow, but on a CPU a sample does not depend on
    /// what else runs, to the last bit.
    pub kernels: Kernels,
    /// Whether a GPU runs passes that only decode as CUDA graphs, captured once for each of a few batch sizes: one
    /// launch per pass instead of hundreds. Default true; no effect on a CPU. Where a graph cannot be captured, a
    /// warning says so and generation continues without.
    pub cuda_graphs: bool,
    /// Mixtures of experts: samples record which experts computed each token, and the learner computes it with the same ones
    /// (docs/MODELS.md). With `engine = "native"` only. Default false; refused for dense models, and where a sample with its routes
    /// does not fit into a message.
    pub router_replay: bool,
    /// The servers of `engine = "vllm"`. Default: the defaults of its keys; refused with another engine.
    pub vllm: Option<VllmSpec>,
}

/// What computes the passes of generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernels {
    /// The fastest available.
    #[default]
    Auto,
    /// libtorch's own operations, one sequence at a time.
    Reference,
}

impl Default for RolloutSpec {
    fn default() -> Self {
        Self {
            engine: RolloutEngineKind::Native,
            samples_per_prompt: 8,
            max_new_tokens: 8192,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            stop: Vec::new(),
            max_concurrent_samples: 256,
            cache_tokens: 0,
            kernels: Kernels::Auto,
            cuda_graphs: true,
            router_replay: false,
            vllm: None,
        }
    }
}

/// How the objective is optimised: AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerSpec {
    /// Learning rate. Default 1e-6, with `[model.lora]` 1e-5; above 0, at most 1.
    pub learning_rate: f64,
    /// Decay of the first moment. Default 0.9, 0 to below 1.
    pub beta1: f64,
    /// Decay of the second moment. Default 0.999, 0 to below 1.
    pub beta2: f64,
    /// Added to the root of the second moment. Default 1e-8, above 0, at most 1.
    pub epsilon: f64,
    /// Decoupled weight decay. Default 0.01, 0 to 1. Times the learning rate it has to be 3e-8 at least: less of a float32
    /// weight is rounded away, at the defaults all of it.
    pub weight_decay: f64,
    /// What decays: `all` parameters (default, as in the reference code), or `matrices` only, not norms and biases.
    pub weight_decay_on: WeightDecayOn,
    /// Largest global gradient norm; 0 turns clipping off, as in the reference code. Default 1.0, 0 to 1e6.
    pub max_grad_norm: f64,
    /// Optimizer updates over which the learning rate rises from 0. Default 0, at most 1,000,000,000.
    pub warmup_updates: u64,
    /// Schedule of the learning rate from the warm-up to the last update of the job. Default `constant`.
    pub schedule: Schedule,
    /// Where `linear` and `cosine` end, as a share of `learning_rate`. Default 0, 0 to 1; needs such a schedule.
    pub final_learning_rate_ratio: f64,
    /// Updates with a non-finite gradient that are skipped before the run stops. Default 10, at most 1,000,000.
    pub max_skipped_updates: u32,
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        Self {
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            weight_decay_on: WeightDecayOn::All,
            max_grad_norm: 1.0,
            warmup_updates: 0,
            schedule: Schedule::Constant,
            final_learning_rate_ratio: 0.0,
            max_skipped_updates: 10,
        }
    }
}

/// The parameters that weight decay applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDecayOn {
    /// All of them, as in the reference code.
    #[default]
    All,
    /// Matrices; not norms and biases.
    Matrices,
}

/// How much goes into a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BatchSpec {
    /// Training steps. Default 300, 1 to 1,000,000,000.
    pub steps: u64,
    /// Prompts of a step. Default 1024, 1 to 1,000,000, with at most 16,777,216 samples.
    pub prompts_per_step: u32,
    /// Optimizer updates of a step; divides `prompts_per_step`. Default 4, at least 1.
    pub mini_batches: u32,
    /// Most tokens that one forward and backward computes at once (a longer sequence goes alone). Default 16384, 1 to
    /// 100,000,000.
    pub micro_batch_tokens: u32,
    /// Whose log-probs of the sampled tokens are those of the old policy: the `learner`'s (default), computed before the
    /// first update of a step, or the `rollout` engine's, which were recorded when the tokens were drawn, by the version that
    /// drew them where rollouts run ahead (`asynchrony.max_lag`), and cost no pass.
    /// `rollout` needs an objective that compares with the policy of the step's beginning.
    pub old_logprobs: OldLogprobs,
}

/// Where the log-probs of the old policy come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OldLogprobs {
    /// A forward of the learner.
    #[default]
    Learner,
    /// The rollout engine.
    Rollout,
}

impl Default for BatchSpec {
    fn default() -> Self {
        Self {
            steps: 300,
            prompts_per_step: 1024,
            mini_batches: 4,
            micro_batch_tokens: 16384,
            old_logprobs: OldLogprobs::Learner,
        }
    }
}

/// When and how the policy is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationSpec {
    /// Steps between evaluations; 0 turns those during training off. Default 20, at most 1,000,000,000.
    pub every_steps: u64,
    /// Measure before the first step. Default true.
    pub before: bool,
    /// Measure after the last step. Default true.
    pub after: bool,
    /// Samples per problem. Default 1, 1 to 1024.
    pub samples_per_problem: u32,
    /// Temperature. Default: that of `rollout`; 0.01 to 10.
    pub temperature: Option<f64>,
    /// Measure the model before the first step, and end: no learner, no step, no checkpoint. `pacs eval` sets it. Default false.
    pub only: bool,
    /// Further sets of held-out problems, each with settings of its own. Default none.
    pub sets: BTreeMap<String, EvaluationSetSpec>,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self {
            every_steps: 20,
            before: true,
            after: true,
            samples_per_problem: 1,
            temperature: None,
            only: false,
            sets: BTreeMap::new(),
        }
    }
}

impl JobSpec {
    /// Whether checkpoints on the way are written while training continues.
    #[must_use]
    pub fn saves_in_background(&self) -> bool {
        self.checkpoint.background && self.checkpoint.every_steps > 0
    }

    /// How long missing learners are waited for before the run continues without them, if it may.
    #[must_use]
    pub fn learner_wait_seconds(&self) -> u32 {
        self.resources.learner_wait_seconds.unwrap_or(120)
    }

    /// Room for groups in flight, those in training included.
    #[must_use]
    pub fn slots(&self) -> u32 {
        let most = (self.asynchrony.max_lag + 1).saturating_mul(self.batch.prompts_per_step);
        self.asynchrony.slots.unwrap_or(most)
    }
}

impl EvaluationSpec {
    /// Whether there is any evaluation at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        let during = |set: &EvaluationSetSpec| set.every_steps.is_some_and(|every| every > 0);
        self.before || self.after || self.every_steps > 0 || self.sets.values().any(during)
    }
}

/// When state is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointSpec {
    /// Steps between checkpoints; 0: only at the end and on a stop. Default 20, at most 1,000,000,000.
    pub every_steps: u64,
    /// Newest checkpoints that are kept. Default 2, 1 to 10,000.
    pub keep: u32,
    /// Besides those, how many of the steps with the best pass@1 are kept, among checkpoints of steps that were
    /// evaluated. Default 0, at most 10,000.
    pub keep_best: u32,
    /// Write checkpoints on the way while training continues, from a copy of the state in host memory; the last one, and that
    /// of a stop, are waited for all the same. Default true.
    pub background: bool,
    /// Silence of a rank after which the checkpoint that it writes is abandoned, and of the disk after which the run
    /// ends. Default 1800, 1 to 86,400.
    pub timeout_seconds: u32,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_steps: 20, keep: 2, keep_best: 0, background: true, timeout_seconds: 1800 }
    }
}

/// What is recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoggingSpec {
    /// Write all samples with their verdicts to `samples/` in the run folder (Parquet). Default true.
    pub samples: bool,
    /// Trackers that `deploy/trackers/follow.py` writes to unless it is told others: `"tensorboard"`, `"wandb"`, `"mlflow"`. It is a
    /// process next to the run; neither coordinator nor workers contact a tracker. Default none.
    pub tracking: Vec<String>,
}

impl LoggingSpec {
    /// Names that `tracking` may hold.
    pub const TRACKERS: [&str; 3] = ["tensorboard", "wandb", "mlflow"];
}

impl Default for LoggingSpec {
    fn default() -> Self {
        Self { samples: true, tracking: Vec::new() }
    }
}

/// How many workers, on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourcesSpec {
    /// Rollout workers that `pacs run` starts. Default 1, 0 to 1024 (0: others bring them).
    pub rollouts: u32,
    /// Learner ranks. Default 1, 1 to 1024; no more than a mini-batch has sequences.
    pub learners: u32,
    /// With how many learner ranks the run continues when others are missing: state is divided among those present, and
    /// the others rejoin between two steps. Default: `learners`, so that the run waits; 1 to `learners`.
    pub min_learners: Option<u32>,
    /// How long the run waits for missing learners before it continues with at least `min_learners`; without effect
    /// where that is not set. Default 120, 1 to 86,400.
    pub learner_wait_seconds: Option<u32>,
    /// Verifier workers that `pacs run` starts. Default 1, 0 to 1024.
    pub verifiers: u32,
    /// Threads of one rollout or learner process; 0: all cores, shared fairly among learner ranks. Default 0,
    /// at most 4096.
    pub threads: u32,
    /// Where tensors live. Default `cpu`.
    pub device: DeviceKind,
    /// How many of this machine's GPUs `pacs run` may use, the first ones of those that are visible. Each learner and each
    /// rollout worker gets one to itself. With `device = "cuda"` only. Default: all that are visible; 1 to 1024.
    pub gpus: Option<u32>,
    /// Rollout workers may share a GPU with each other and with a learner rank where there are too few, by a part of its memory
    /// each; learner ranks never share one. With `device = "cuda"` only. Default `false`: the run is refused then.
    pub share_gpus: bool,
    /// Whether GPU kernels that are not available (no NVRTC, a model that none of them fits) end the run with an error.
    /// With `false` it continues with libtorch's own operations, several times slower. With `device = "cuda"` only.
    /// Default `true`.
    pub require_gpu_kernels: bool,
    /// What of the training state every learner rank holds as a whole: `replicated` (default, everything),
    /// `shard_optimizer` (weights and gradients), or `shard_all` (nothing: layers come when they are used).
    pub sharding: Sharding,
    /// A batch gives the same weights to the last bit whatever the number of learners, `sharding`, `batch.micro_batch_tokens`
    /// and the number of threads, at a price (docs/PERFORMANCE.md). On processors of one kind, and with `device = "cpu"`
    /// only. Default `false`.
    pub deterministic: bool,
    /// Memory that one learner rank may use, in GiB. Activations that do not fit are computed again in the backward.
    /// Default 0: what the device has. At most 1,000,000.
    pub learner_memory_gib: f64,
    /// Floating-point operations a second that one learner rank's device is capable of in the job's precision; with it
    /// every step reports `model_flops_utilisation`. Default: none, 1e6 to 1e18.
    pub peak_flops: Option<f64>,
}

impl Default for ResourcesSpec {
    fn default() -> Self {
        Self {
            rollouts: 1,
            learners: 1,
            min_learners: None,
            learner_wait_seconds: None,
            verifiers: 1,
            threads: 0,
            device: DeviceKind::Cpu,
            gpus: None,
            share_gpus: false,
            require_gpu_kernels: true,
            sharding: Sharding::Replicated,
            deterministic: false,
            learner_memory_gib: 0.0,
            peak_flops: None,
        }
    }
}

/// Where tensors live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// Tensors are in host memory, and the processor computes.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}
