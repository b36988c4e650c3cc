//! Derives the machine's options from a job spec.

use std::collections::BTreeSet;
use std::time::Duration;

use pacs_algo::{AdvantageEstimator, Contrasts, Objective, ScoreEstimator};
use pacs_data::{MeasuredSet, Problems};
use pacs_machine::{
    Contrast, EvaluationPlan, EvaluationSetPlan, Options, Snapshot, Staleness, UniformBy, UniformGroups,
};
use pacs_order::Curriculum;
use pacs_spec::{JobSpec, RewardSpec, StalenessKind, UniformKind};

use crate::Timing;
use crate::records::Manifest;

/// Distance between the id ranges of two starts in one folder, so that ids of different processes never collide.
const IDS_OF_A_START: u64 = 1_000_000_000_000;
/// The same for generations.
const GENERATIONS_OF_A_START: u64 = 1000;
/// A limit, because each lost save costs all steps since the last checkpoint.
const MOST_LOST_SAVES: u32 = 5;

/// The machine's options for a job that starts at its beginning or at a checkpoint.
pub(crate) fn machine_options(
    spec: &JobSpec,
    problems: &Problems,
    timing: Timing,
    resumed: Option<Manifest>,
    evaluated: BTreeSet<u64>,
    starts: u64,
) -> Options {
    let (start, exported) =
        resumed.map_or((Snapshot::default(), false), |manifest| (manifest.snapshot, manifest.model));
    let verification = verification_limit(spec);
    let plan = |measured: &MeasuredSet| EvaluationPlan {
        problems: u32::try_from(measured.problems.len()).unwrap_or(u32::MAX),
        samples_per_problem: measured.set.samples,
        every_steps: measured.set.every_steps,
        before: spec.evaluation.before,
        after: spec.evaluation.after,
    };
    let unnamed = problems.sets.iter().find(|measured| measured.set.name.is_none());
    let named = problems.sets.iter().filter(|measured| measured.set.name.is_some());
    Options {
        learners: spec.resources.learners,
        min_learners: spec.resources.min_learners.unwrap_or(spec.resources.learners),
        learner_wait: Duration::from_secs(u64::from(spec.learner_wait_seconds())),
        samples_per_prompt: spec.rollout.samples_per_prompt,
        prompts_per_step: spec.batch.prompts_per_step,
        total_steps: spec.batch.steps,
        max_lag: spec.asynchrony.max_lag,
        slots: spec.slots(),
        staleness: match spec.asynchrony.staleness {
            StalenessKind::Wait => Staleness::Wait,
            StalenessKind::Evict => Staleness::Evict,
            StalenessKind::Accept => Staleness::Accept,
        },
        uniform_groups: match spec.groups.uniform {
            UniformKind::Keep => UniformGroups::Keep,
            UniformKind::Drop => UniformGroups::Drop,
            UniformKind::Refill => UniformGroups::Refill,
        },
        // Validation refuses `drop` and `refill` for objectives that contrast neither.
        uniform_by: match spec.objective.objective(spec.rollout.max_new_tokens).contrasts() {
            Contrasts::Rewards => UniformBy::Rewards,
            Contrasts::Labels | Contrasts::Nothing => UniformBy::Labels,
        },
        max_refills: spec.groups.max_refills.unwrap_or(spec.batch.prompts_per_step.saturating_mul(3)),
        min_batch_groups: smallest_batch(spec),
        contrast: contrast(spec),
        curriculum: curriculum(spec, problems),
        evaluation: unnamed.map_or(EvaluationPlan::default(), plan),
        evaluation_sets: named.map(|set| EvaluationSetPlan { first: set.set.first, plan: plan(set) }).collect(),
        evaluation_only: spec.evaluation.only,
        checkpoint_every_steps: spec.checkpoint.every_steps,
        background_saves: spec.saves_in_background(),
        checkpoint_timeout: Duration::from_secs(u64::from(spec.checkpoint.timeout_seconds)),
        max_attempts: spec.verifier.max_attempts,
        max_replacements: spec.verifier.max_replacements,
        max_skipped_updates: u64::from(spec.optimizer.max_skipped_updates),
        group_timeout: Duration::from_secs(u64::from(spec.groups.timeout_seconds)),
        max_group_attempts: spec.groups.max_attempts,
        max_worker_losses: spec.groups.max_worker_losses,
        task_timeout: Duration::from_secs(u64::from(spec.watchdog.task_seconds)),
        stall_timeout: Duration::from_secs(u64::from(spec.watchdog.stall_seconds)),
        max_stalls: spec.watchdog.max_stalls,
        max_lost_generations: 10,
        max_lost_saves: MOST_LOST_SAVES,
        heartbeat_timeout: timing.heartbeat_timeout,
        // Only for lost answers of live workers: longer than any regular work takes.
        rollout_lease_timeout: Duration::from_secs(3600),
        verifier_lease_timeout: Duration::from_secs(120) + 10 * verification,
        ids_above: starts * IDS_OF_A_START,
        generations_above: starts * GENERATIONS_OF_A_START,
        start,
        exported,
        evaluated,
    }
}

/// The curriculum, if the job skips draws.
fn curriculum(spec: &JobSpec, problems: &Problems) -> Option<Curriculum> {
    let (retire_after, difficulty_floor) = (spec.data.retire_after, spec.data.difficulty_floor);
    let is_on = retire_after.is_some() || difficulty_floor.is_some();
    let least_left = spec.batch.prompts_per_step as usize;
    (is_on && !spec.evaluation.only).then(|| Curriculum {
        plan: problems.plan().clone(),
        retire_after,
        difficulty_floor,
        least_left,
    })
}

/// Smallest batch with a group for every mini-batch and a sequence for every rank in each of them.
fn smallest_batch(spec: &JobSpec) -> u32 {
    let per_mini_batch = spec.resources.learners.div_ceil(spec.rollout.samples_per_prompt);
    spec.batch.mini_batches.saturating_mul(per_mini_batch).min(spec.batch.prompts_per_step)
}

/// The level at which the job needs label variance for a non-zero gradient.
fn contrast(spec: &JobSpec) -> Contrast {
    let policy = match spec.objective.objective(spec.rollout.max_new_tokens) {
        Objective::Pacs(pacs) if pacs.actor_term || pacs.score == ScoreEstimator::Naive => return Contrast::None,
        Objective::Pacs(_) | Objective::Disco(_) => return Contrast::Group,
        Objective::Real(_) | Objective::External => return Contrast::None,
        Objective::Policy(policy) => policy,
    };
    let RewardSpec { format_bonus, overlong_tokens, verifiers, .. } = &spec.reward;
    let has_reward_beside_label = *format_bonus != 0.0 || *overlong_tokens > 0 || !verifiers.is_empty();
    // External verifiers may give a reward with more information than the label.
    let all_built_in = spec.named_verifiers().iter().all(|(_, verifier)| verifier.kind.is_built_in());
    if has_reward_beside_label || !spec.verifier.kind.is_built_in() || !all_built_in {
        return Contrast::None;
    }
    // Either term has a gradient even if all answers are the same.
    if policy.entropy > 0.0 || policy.kl.is_some() {
        return Contrast::None;
    }
    match policy.advantage {
        AdvantageEstimator::Grpo
        | AdvantageEstimator::DrGrpo
        | AdvantageEstimator::Rloo
        | AdvantageEstimator::WeightedRloo { .. }
        | AdvantageEstimator::MaxRl
        | AdvantageEstimator::ReinforcePpBaseline => Contrast::Group,
        AdvantageEstimator::ReinforcePp { .. } | AdvantageEstimator::Remax | AdvantageEstimator::Gae { .. } => {
            Contrast::Step
        }
    }
}

/// Upper bound on the verification of one sample by all its verifiers.
fn verification_limit(spec: &JobSpec) -> Duration {
    let rewards = spec.reward.verifiers.values().map(|verifier| verifier.judge().longest());
    let rewards = rewards.fold(Duration::ZERO, Duration::saturating_add);
    // Problems that name a verifier have the same further ones.
    let named = spec.named_verifiers().into_iter().map(|(_, verifier)| verifier.judge().longest());
    let labels = named.fold(spec.verifier.judge().longest(), Duration::max);
    let sets = spec.all_evaluation_sets().filter_map(|set| set.verifier);
    sets.map(|verifier| verifier.judge().longest()).fold(labels.saturating_add(rewards), Duration::max)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn of(settings: &str) -> Contrast {
        let spec = format!(
            "name = \"c\"\n[model]\npath = \"m\"\n[data.train]\npath = \"p.jsonl\"\n\
             [evaluation]\nbefore = false\nafter = false\nevery_steps = 0\n{settings}"
        );
        contrast(&pacs_spec::parse(&spec, Path::new("job.toml")).unwrap_or_else(|error| panic!("{settings}: {error}")))
    }

    #[test]
    fn what_a_step_can_teach_is_a_matter_of_objective_and_reward() {
        assert_eq!(of(""), Contrast::Group);
        // PACS trains on the label alone.
        assert_eq!(of("[reward]\nformat_bonus = 0.1\nformat_strings = [\"x\"]"), Contrast::Group);
        assert_eq!(of("[objective]\nscore = \"naive\""), Contrast::None);
        assert_eq!(of("[objective]\nactor_term = true"), Contrast::None);
        for (kind, contrast) in [
            ("grpo", Contrast::Group),
            ("dapo", Contrast::Group),
            ("rloo", Contrast::Group),
            ("reinforce_pp_baseline", Contrast::Group),
            ("reinforce_pp", Contrast::Step),
            ("ppo", Contrast::Step),
        ] {
            let objective = format!("[objective]\nkind = \"{kind}\"\n");
            assert_eq!(of(&objective), contrast, "{kind}");
            for more in [
                "kl_coefficient = 0.01",
                "entropy_coefficient = 0.01",
                "[reward]\noverlong_tokens = 8",
                "[reward]\nformat_bonus = 0.1\nformat_strings = [\"x\"]",
                "[reward.verifiers.style]\nkind = \"exec\"\ncommand = [\"true\"]",
                "[verifier]\nkind = \"exec\"\ncommand = [\"true\"]",
            ] {
                assert_eq!(of(&format!("{objective}{more}")), Contrast::None, "{kind} {more}");
            }
        }
    }
}
