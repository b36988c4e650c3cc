//! The objective of a job: one list of settings, of which every kind uses its own.

use pacs_algo::{
    AdvantageEstimator, Aggregation, Clip, DiscoConfig, Divergence, ImportanceLevel, ImportanceMode, ImportanceWeights,
    KlKind, KlPenalty, KlPlace, LabelWeights, Objective, PacsConfig, PolicyConfig, RealConfig, RewardMethod,
    ScoreEstimator, Surrogate, ValueConfig,
};
use serde::{Deserialize, Serialize};
use toml::Table;

/// What is optimised. A setting that the chosen kind has no use for is refused; what is not set gets the kind's default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ObjectiveSpec {
    /// The objective. Default `pacs`.
    pub kind: ObjectiveKind,

    /// PACS: scale of the reward proxy. Default 1.0, above 0, at most 1,000.
    pub beta: Option<f64>,
    /// PACS: how a group's proxies become scores. Default `rloo`.
    pub score: Option<ScoreEstimator>,
    /// PACS: what the proxy is. Default `log_ratio`, the paper's.
    pub reward_method: Option<RewardMethod>,
    /// PACS: weights of the labels. Default `question`, the paper's.
    pub label_weights: Option<LabelWeights>,
    /// PACS: add the actor term of the paper's equation 5, which the reference code leaves out. Default false.
    pub actor_term: Option<bool>,
    /// PACS: clear the optimizer's moments at every reference reset. Default false.
    pub reset_optimizer: Option<bool>,

    /// `weighted_rloo`: exponent `a` of the weight `p^-a (1 - p)^-b` of a prompt with pass rate `p`. Default 1.0, 0 to 10.
    pub pass_exponent: Option<f64>,
    /// `weighted_rloo`: exponent `b` of the same. Default 1.0, 0 to 10.
    pub fail_exponent: Option<f64>,
    /// `real`: what the mean log-ratio of an answer is divided by. `disco`: temperature of the wrong answers of a prompt, below
    /// which the likeliest of them count alone. Default 0.5 (`disco` 10), above 0, at most 1,000.
    pub tau: Option<f64>,
    /// `disco`: divergence from the old policy without penalty, nats per token. Default 1e-4, 0 to 10.
    pub constraint_delta: Option<f64>,
    /// `disco`: weight of the squared excess over that. Default 1000, 0 to 1,000,000.
    pub constraint_penalty: Option<f64>,
    /// `dppo`: how the change of a probability is measured: `tv`, its difference, or `kl`, nats of the token against
    /// all others. Default `tv`.
    pub divergence: Option<Divergence>,
    /// `dppo`: the largest weight of a token. Default 20, 1 to 1,000.
    pub ratio_cap: Option<f64>,
    /// `external`: program and arguments of the objective; `docs/OBJECTIVES.md` says what it is asked. Required.
    pub command: Option<Vec<String>>,
    /// `external`: seconds that it may take to start and for an update. Default 60, 1 to 3,600.
    pub timeout_seconds: Option<f64>,

    /// Training steps between resets of the reference policy to the current one. PACS: default 1, as the reference code
    /// does, at least 1. Others: the reference of the KL penalty; default 0 (never: it stays the model of the job).
    pub reference_reset_steps: Option<u64>,

    /// Policy gradients: the probability ratio is held above 1 minus this. `dppo`: a token that became so much less likely, with
    /// a negative advantage, is left out. Default 0.2 (`gspo` 3e-4, `cispo` 1: no bound), 0 to 1.
    pub clip_low: Option<f64>,
    /// Policy gradients: the probability ratio is held below 1 plus this. `dppo`: a token that became so much likelier, with a
    /// positive advantage, is left out. Default 0.2 (`dapo` 0.28, `gspo` 4e-4, `cispo` 4), 0 to 1,000.
    pub clip_high: Option<f64>,
    /// Policy gradients but `cispo` and `dppo`: bound of the loss of a negative advantage, in units of that advantage; 0 turns it off. Default 3
    /// (`dr_grpo`, `dapo` and `gspo` 0), above 1, at most 1,000.
    pub dual_clip: Option<f64>,
    /// Policy gradients: how token losses become one number. Default by kind: `seq_mean_token_mean` for `grpo`, `gspo` and
    /// `ppo`, `seq_mean_token_sum_norm` for `dr_grpo`, `seq_mean_token_sum` for `rloo`, `weighted_rloo` and `maxrl`,
    /// `token_mean` for the others.
    pub aggregation: Option<AggregationKind>,
    /// Policy gradients: leave truncated answers out of the loss. Default false (`dapo` true).
    pub mask_truncated: Option<bool>,
    /// `reinforce_pp` and `ppo`: discount of a reward for every token before it. Default 1.0, above 0, at most 1.
    pub gamma: Option<f64>,
    /// `ppo`: share of the advantage estimate that looks one token further; 1 looks at the reward alone, 0 at the next
    /// value alone. Default 1.0, 0 to 1.
    pub lambda: Option<f64>,
    /// `ppo`: how far a value may move within a step before it stops to learn. Default 0.5, above 0, at most 1,000.
    pub value_clip: Option<f64>,
    /// `ppo`: learning rate of the value model; the rest of `optimizer` holds for both models. Default 1e-5, above 0, at
    /// most 1.
    pub critic_learning_rate: Option<f64>,
    /// `ppo`: first steps in which the value model is trained and the policy is not. Default 0, fewer than `batch.steps`.
    pub critic_warmup_steps: Option<u64>,
    /// Policy gradients: weight of the mean entropy of the policy, which is subtracted from the loss. Default 0 (off), at
    /// most 10.
    pub entropy_coefficient: Option<f64>,
    /// Policy gradients: weight of a KL penalty against a frozen reference policy. Default 0 (off), at most 10.
    pub kl_coefficient: Option<f64>,
    /// Policy gradients: estimator of that penalty. Default `k3`.
    pub kl_kind: Option<KlKind>,
    /// Policy gradients: where the penalty enters, `loss` or `reward`. Default `loss`.
    pub kl_place: Option<KlPlace>,
    /// PACS and policy gradients but `dppo`: correction for the difference between the rollout engine's and the learner's
    /// log-probs, by kernels or by the age of weights. Default `off`. PACS: with `reference_reset_steps` = 1 only.
    pub importance: Option<ImportanceKind>,
    /// What is corrected: each `token`, each `sequence` as a whole, or that by the `geometric` mean of its tokens. Default
    /// `token`; PACS: `sequence`, and no single tokens.
    pub importance_level: Option<ImportanceLevel>,
    /// The largest weight of that correction. Default 2.0, 1 to 1,000.
    pub importance_cap: Option<f64>,
}

/// Training objective; `docs/OBJECTIVES.md` has the formulas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveKind {
    /// Implicit actor critic coupling through supervised learning.
    #[default]
    Pacs,
    /// Group-relative policy optimisation.
    Grpo,
    /// GRPO without its two biases.
    DrGrpo,
    /// GRPO with a higher upper bound and token-level loss.
    Dapo,
    /// GRPO with one ratio per answer.
    Gspo,
    /// REINFORCE with a leave-one-out baseline.
    Rloo,
    /// REINFORCE with advantages whitened over the step.
    ReinforcePp,
    /// The same with the group mean as baseline.
    ReinforcePpBaseline,
    /// Proximal policy optimisation, with a value model besides the policy.
    Ppo,
    /// REINFORCE with a leave-one-out baseline, each prompt weighted by its pass rate.
    WeightedRloo,
    /// The likelihood of right answers, expanded in pass@k.
    Maxrl,
    /// Log-probs weighted by clipped ratios.
    Cispo,
    /// A trust region of probabilities instead of ratios.
    Dppo,
    /// Rewards as labels of the mean log-ratio of an answer.
    Real,
    /// Right answers above wrong ones by their mean log-prob, near the old policy.
    Disco,
    /// A program of your own.
    External,
}

/// How token losses become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AggregationKind {
    /// Mean over all tokens of the mini-batch.
    TokenMean,
    /// Mean over answers of the mean over their tokens.
    SeqMeanTokenMean,
    /// Mean over answers of the sum over their tokens.
    SeqMeanTokenSum,
    /// The same, divided by `rollout.max_new_tokens`.
    SeqMeanTokenSumNorm,
    /// Sum over all tokens, divided by `rollout.max_new_tokens`.
    TokenSumNorm,
}

/// Correction for the difference between the rollout engine's and the learner's log-probs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceKind {
    /// Every weight is 1.
    Off,
    /// Weights above the cap become the cap.
    Truncate,
    /// Weights above the cap or below its inverse become 0.
    Mask,
}

impl ObjectiveKind {
    /// All kinds, in the order in which they are listed for people.
    pub const ALL: [Self; 16] = [
        Self::Pacs,
        Self::Grpo,
        Self::DrGrpo,
        Self::Dapo,
        Self::Gspo,
        Self::Rloo,
        Self::ReinforcePp,
        Self::ReinforcePpBaseline,
        Self::Ppo,
        Self::WeightedRloo,
        Self::Maxrl,
        Self::Cispo,
        Self::Dppo,
        Self::Real,
        Self::Disco,
        Self::External,
    ];

    /// The name in a spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pacs => "pacs",
            Self::Grpo => "grpo",
            Self::DrGrpo => "dr_grpo",
            Self::Dapo => "dapo",
            Self::Gspo => "gspo",
            Self::Rloo => "rloo",
            Self::ReinforcePp => "reinforce_pp",
            Self::ReinforcePpBaseline => "reinforce_pp_baseline",
            Self::Ppo => "ppo",
            Self::WeightedRloo => "weighted_rloo",
            Self::Maxrl => "maxrl",
            Self::Cispo => "cispo",
            Self::Dppo => "dppo",
            Self::Real => "real",
            Self::Disco => "disco",
            Self::External => "external",
        }
    }

    /// Whether the kind has a use for a setting.
    pub(crate) fn uses(self, key: &str) -> bool {
        table(&self.defaults()).contains_key(key)
    }

    /// The published settings of policy gradients; `length` is the constant that some aggregations divide by.
    fn policy(self, length: f64) -> Option<PolicyConfig> {
        Some(match self {
            Self::Pacs | Self::Real | Self::Disco | Self::External => return None,
            Self::Grpo => pacs_algo::grpo(),
            Self::DrGrpo => pacs_algo::dr_grpo(length),
            Self::Dapo => pacs_algo::dapo(),
            Self::Gspo => pacs_algo::gspo(),
            Self::Rloo => pacs_algo::rloo(),
            Self::ReinforcePp => pacs_algo::reinforce_pp(),
            Self::ReinforcePpBaseline => pacs_algo::reinforce_pp_baseline(),
            Self::Ppo => pacs_algo::ppo(),
            Self::WeightedRloo => pacs_algo::weighted_rloo(1.0, 1.0),
            Self::Maxrl => pacs_algo::maxrl(),
            Self::Cispo => pacs_algo::cispo(),
            Self::Dppo => pacs_algo::dppo(),
        })
    }

    /// Every setting that the kind has a use for, at its default.
    #[must_use]
    pub fn defaults(self) -> ObjectiveSpec {
        let Some(policy) = self.policy(1.0) else { return self.other_defaults() };
        let (pass_exponent, fail_exponent) = match policy.advantage {
            AdvantageEstimator::WeightedRloo { right, wrong } => (Some(right), Some(wrong)),
            _ => (None, None),
        };
        let (divergence, ratio_cap) = match policy.surrogate {
            Surrogate::Masked { divergence, cap } => (Some(divergence), Some(cap)),
            Surrogate::Clipped | Surrogate::Weighted => (None, None),
        };
        // A mask weighs by the rollout engine's log-probs itself.
        let weighs = divergence.is_none();
        let (gamma, lambda) = match policy.advantage {
            AdvantageEstimator::ReinforcePp { gamma } => (Some(gamma), None),
            AdvantageEstimator::Gae { gamma, lambda } => (Some(gamma), Some(lambda)),
            _ => (None, None),
        };
        ObjectiveSpec {
            kind: self,
            reference_reset_steps: Some(0),
            clip_low: Some(policy.clip.low),
            clip_high: Some(policy.clip.high),
            pass_exponent,
            fail_exponent,
            divergence,
            ratio_cap,
            dual_clip: (policy.surrogate == Surrogate::Clipped).then_some(policy.clip.dual.unwrap_or(0.0)),
            aggregation: Some(AggregationKind::from(policy.aggregation)),
            mask_truncated: Some(policy.mask_truncated),
            gamma,
            lambda,
            value_clip: policy.value.map(|value| value.clip),
            critic_learning_rate: policy.value.map(|_| CRITIC_LEARNING_RATE),
            critic_warmup_steps: policy.value.map(|value| value.warmup_steps),
            entropy_coefficient: Some(policy.entropy),
            kl_coefficient: Some(0.0),
            kl_kind: Some(KlKind::K3),
            kl_place: Some(KlPlace::Loss),
            importance: weighs.then_some(ImportanceKind::Off),
            importance_level: weighs.then_some(ImportanceLevel::Token),
            importance_cap: weighs.then_some(2.0),
            ..ObjectiveSpec::default()
        }
    }

    /// The same for kinds that are no policy gradient.
    fn other_defaults(self) -> ObjectiveSpec {
        let plain = ObjectiveSpec { kind: self, ..ObjectiveSpec::default() };
        match self {
            Self::Real => ObjectiveSpec { tau: Some(pacs_algo::real().tau), ..plain },
            Self::Disco => {
                let DiscoConfig { tau, delta, penalty } = pacs_algo::disco();
                ObjectiveSpec {
                    tau: Some(tau),
                    constraint_delta: Some(delta),
                    constraint_penalty: Some(penalty),
                    ..plain
                }
            }
            Self::External => {
                ObjectiveSpec { command: Some(Vec::new()), timeout_seconds: Some(EXTERNAL_TIMEOUT), ..plain }
            }
            _ => ObjectiveSpec {
                beta: Some(1.0),
                score: Some(ScoreEstimator::Rloo),
                reward_method: Some(RewardMethod::LogRatio),
                label_weights: Some(LabelWeights::Question),
                actor_term: Some(false),
                reset_optimizer: Some(false),
                reference_reset_steps: Some(1),
                importance: Some(ImportanceKind::Off),
                importance_level: Some(ImportanceLevel::Sequence),
                importance_cap: Some(2.0),
                ..plain
            },
        }
    }
}

impl ObjectiveSpec {
    /// The same with the kind's default for everything that is not set.
    #[must_use]
    pub fn filled(&self) -> Self {
        let mut settings = table(&self.kind.defaults());
        settings.extend(table(self));
        settings.try_into().expect("the settings of both are those of a spec")
    }

    /// Settings that differ from the kind's defaults, as TOML.
    #[must_use]
    pub fn changed(&self) -> Vec<String> {
        let defaults = table(&self.kind.defaults());
        let changed = table(self).into_iter().filter(|(key, value)| defaults.get(key) != Some(value));
        changed.map(|(key, value)| format!("{key} = {value}")).collect()
    }

    /// Settings that are there although the kind has no use for them: key and value.
    pub(crate) fn ignored(&self) -> Vec<(String, String)> {
        let ignored = table(self).into_iter().filter(|(key, _)| !self.kind.uses(key));
        ignored.map(|(key, value)| (key, value.to_string())).collect()
    }

    /// The objective itself. `max_new_tokens` is the constant length that some aggregations divide by.
    #[must_use]
    pub fn objective(&self, max_new_tokens: u32) -> Objective {
        let length = f64::from(max_new_tokens);
        let Some(published) = self.kind.policy(length) else { return self.other_objective() };
        let advantage = match (published.advantage, self.gamma) {
            (AdvantageEstimator::ReinforcePp { .. }, Some(gamma)) => AdvantageEstimator::ReinforcePp { gamma },
            (AdvantageEstimator::WeightedRloo { right, wrong }, _) => AdvantageEstimator::WeightedRloo {
                right: self.pass_exponent.unwrap_or(right),
                wrong: self.fail_exponent.unwrap_or(wrong),
            },
            (AdvantageEstimator::Gae { gamma, lambda }, set) => {
                AdvantageEstimator::Gae { gamma: set.unwrap_or(gamma), lambda: self.lambda.unwrap_or(lambda) }
            }
            (other, _) => other,
        };
        let value = published.value.map(|value| ValueConfig {
            clip: self.value_clip.unwrap_or(value.clip),
            warmup_steps: self.critic_warmup_steps.unwrap_or(value.warmup_steps),
            ..value
        });
        let clip = Clip {
            low: self.clip_low.unwrap_or(published.clip.low),
            high: self.clip_high.unwrap_or(published.clip.high),
            dual: self.dual_clip.map_or(published.clip.dual, |dual| (dual > 0.0).then_some(dual)),
        };
        let surrogate = match published.surrogate {
            Surrogate::Masked { divergence, cap } => Surrogate::Masked {
                divergence: self.divergence.unwrap_or(divergence),
                cap: self.ratio_cap.unwrap_or(cap),
            },
            other => other,
        };
        Objective::Policy(PolicyConfig {
            advantage,
            surrogate,
            clip,
            aggregation: self.aggregation.map_or(published.aggregation, |kind| kind.with(length)),
            mask_truncated: self.mask_truncated.unwrap_or(published.mask_truncated),
            kl: self.kl(),
            importance: self.importance_weights(),
            entropy: self.entropy_coefficient.unwrap_or(published.entropy),
            value,
            ..published
        })
    }

    fn other_objective(&self) -> Objective {
        match self.kind {
            ObjectiveKind::Real => Objective::Real(RealConfig { tau: self.tau.unwrap_or(pacs_algo::real().tau) }),
            ObjectiveKind::Disco => {
                let published = pacs_algo::disco();
                Objective::Disco(DiscoConfig {
                    tau: self.tau.unwrap_or(published.tau),
                    delta: self.constraint_delta.unwrap_or(published.delta),
                    penalty: self.constraint_penalty.unwrap_or(published.penalty),
                })
            }
            ObjectiveKind::External => Objective::External,
            _ => Objective::Pacs(self.pacs()),
        }
    }

    fn pacs(&self) -> PacsConfig {
        let paper = PacsConfig::paper();
        PacsConfig {
            beta: self.beta.unwrap_or(paper.beta),
            score: self.score.unwrap_or(paper.score),
            reward_method: self.reward_method.unwrap_or(paper.reward_method),
            label_weights: self.label_weights.unwrap_or(paper.label_weights),
            actor_term: self.actor_term.unwrap_or(paper.actor_term),
            importance: self.importance_weights(),
        }
    }

    fn kl(&self) -> Option<KlPenalty> {
        let coefficient = self.kl_coefficient.filter(|coefficient| *coefficient > 0.0)?;
        let (kind, place) = (self.kl_kind.unwrap_or(KlKind::K3), self.kl_place.unwrap_or(KlPlace::Loss));
        Some(KlPenalty { coefficient, kind, place })
    }

    fn importance_weights(&self) -> Option<ImportanceWeights> {
        let mode = match self.importance? {
            ImportanceKind::Off => return None,
            ImportanceKind::Truncate => ImportanceMode::Truncate,
            ImportanceKind::Mask => ImportanceMode::Mask,
        };
        let usual = if self.kind == ObjectiveKind::Pacs { ImportanceLevel::Sequence } else { ImportanceLevel::Token };
        let (level, cap) = (self.importance_level.unwrap_or(usual), self.importance_cap.unwrap_or(2.0));
        Some(ImportanceWeights { level, mode, cap })
    }
}

impl AggregationKind {
    fn with(self, length: f64) -> Aggregation {
        match self {
            Self::TokenMean => Aggregation::TokenMean,
            Self::SeqMeanTokenMean => Aggregation::SeqMeanTokenMean,
            Self::SeqMeanTokenSum => Aggregation::SeqMeanTokenSum,
            Self::SeqMeanTokenSumNorm => Aggregation::SeqMeanTokenSumNorm { length },
            Self::TokenSumNorm => Aggregation::TokenSumNorm { length },
        }
    }
}

impl From<Aggregation> for AggregationKind {
    fn from(aggregation: Aggregation) -> Self {
        match aggregation {
            Aggregation::TokenMean => Self::TokenMean,
            Aggregation::SeqMeanTokenMean => Self::SeqMeanTokenMean,
            Aggregation::SeqMeanTokenSum => Self::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenSumNorm { .. } => Self::SeqMeanTokenSumNorm,
            Aggregation::TokenSumNorm { .. } => Self::TokenSumNorm,
        }
    }
}

/// Seconds that a program may take for an update: far longer than arithmetic on a few numbers an answer needs.
const EXTERNAL_TIMEOUT: f64 = 60.0;

/// Learning rate of a value model in the PACS paper's scripts, ten times that of the policy.
const CRITIC_LEARNING_RATE: f64 = 1e-5;

/// The settings that are there, by name.
fn table(spec: &ObjectiveSpec) -> Table {
    Table::try_from(spec).expect("an objective is a TOML table")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_a_spec() {
        for kind in ObjectiveKind::ALL {
            assert_eq!(toml::Value::try_from(kind).expect("a name").as_str(), Some(kind.name()));
        }
    }

    #[test]
    fn filling_in_keeps_what_is_set_and_changes_nothing() {
        for kind in ObjectiveKind::ALL {
            let plain = ObjectiveSpec { kind, ..ObjectiveSpec::default() };
            assert_eq!(plain.filled(), kind.defaults());
            assert_eq!(plain.filled().objective(64), plain.objective(64), "{}", kind.name());
            assert_eq!(plain.filled().changed(), [""; 0]);
            match (kind.policy(64.0), plain.objective(64)) {
                (Some(published), Objective::Policy(config)) => assert_eq!(config, published),
                (published, objective) => assert!(published.is_none() && !matches!(objective, Objective::Policy(_))),
            }
        }
        let spec = ObjectiveSpec { kind: ObjectiveKind::Dapo, clip_high: Some(0.5), ..ObjectiveSpec::default() };
        assert_eq!(spec.filled().changed(), ["clip_high = 0.5"]);
        assert_eq!(spec.filled().clip_low, Some(0.2));
    }

    #[test]
    fn every_setting_reaches_the_objective() {
        let set = |kind: ObjectiveKind, text: &str| {
            let table: Table = toml::from_str(text).expect("TOML");
            let mut all = self::table(&kind.defaults());
            all.extend(table);
            let spec: ObjectiveSpec = all.try_into().expect("settings");
            spec.objective(64)
        };
        let plain = |kind: ObjectiveKind| kind.defaults().objective(64);
        for text in [
            "beta = 2.0",
            "score = 'naive'",
            "reward_method = 'mean_logprob'",
            "label_weights = 'none'",
            "actor_term = true",
            "importance = 'mask'",
        ] {
            assert_ne!(set(ObjectiveKind::Pacs, text), plain(ObjectiveKind::Pacs), "{text}");
        }
        for text in [
            "clip_low = 0.1",
            "clip_high = 0.1",
            "dual_clip = 0.0",
            "aggregation = 'token_sum_norm'",
            "mask_truncated = true",
            "gamma = 0.9",
            "kl_coefficient = 0.1",
            "importance = 'mask'",
            "entropy_coefficient = 0.01",
        ] {
            assert_ne!(set(ObjectiveKind::ReinforcePp, text), plain(ObjectiveKind::ReinforcePp), "{text}");
        }
        for (kind, text) in [
            (ObjectiveKind::WeightedRloo, "pass_exponent = 0.5"),
            (ObjectiveKind::WeightedRloo, "fail_exponent = 0.0"),
            (ObjectiveKind::Dppo, "divergence = 'kl'"),
            (ObjectiveKind::Dppo, "ratio_cap = 5.0"),
            (ObjectiveKind::Cispo, "clip_high = 7.0"),
            (ObjectiveKind::Real, "tau = 1.0"),
            (ObjectiveKind::Disco, "tau = 1.0"),
            (ObjectiveKind::Disco, "constraint_delta = 1.0"),
            (ObjectiveKind::Disco, "constraint_penalty = 1.0"),
        ] {
            assert_ne!(set(kind, text), plain(kind), "{text}");
        }
        for text in ["gamma = 0.9", "lambda = 0.9", "value_clip = 0.1", "critic_warmup_steps = 2"] {
            assert_ne!(set(ObjectiveKind::Ppo, text), plain(ObjectiveKind::Ppo), "{text}");
        }
        let penalised =
            |text: &str| set(ObjectiveKind::Grpo, &format!("kl_coefficient = 0.1\nimportance = 'mask'\n{text}"));
        for text in ["kl_kind = 'k1'", "kl_place = 'reward'", "importance_level = 'sequence'", "importance_cap = 3.0"] {
            assert_ne!(penalised(text), penalised(""), "{text}");
        }
    }
}
