use pacs_algo::Contrasts;

use super::Check;
use crate::*;

impl Check {
    /// Settings of the flow of groups: none that would stand still, none that would be ignored.
    pub(super) fn flow(&mut self, spec: &JobSpec) {
        let (asynchrony, per_step) = (&spec.asynchrony, spec.batch.prompts_per_step);
        self.range("asynchrony.max_lag", asynchrony.max_lag, 0..=64);
        let versions = asynchrony.max_lag.min(64) + 1;
        let most = versions.saturating_mul(per_step);
        if let Some(slots) = asynchrony.slots {
            let also = &["batch.prompts_per_step", "asynchrony.max_lag"];
            let message = format!(
                "expected {per_step} or more: a step takes {per_step} groups (`batch.prompts_per_step`), and with fewer \
                 slots no step would ever have them"
            );
            self.that(slots >= per_step, "asynchrony.slots", slots, message, also);
            let message = format!(
                "expected {most} or less, {versions} x {per_step}: with `asynchrony.max_lag` = {}, groups beyond that would \
                 grow too old before their step comes",
                asynchrony.max_lag
            );
            self.that(slots <= most, "asynchrony.slots", slots, message, also);
        }
        let wait = asynchrony.staleness == StalenessKind::Wait;
        let message = "has no effect while `asynchrony.max_lag` is 0: no group is ever older than the weights";
        let kind = staleness_name(asynchrony.staleness);
        self.that(wait || asynchrony.max_lag > 0, "asynchrony.staleness", kind, message, &["asynchrony.max_lag"]);
        let weighted = spec.objective.importance.is_some_and(|importance| importance != ImportanceKind::Off);
        // Its weights are those of the rollout engine's own log-probs.
        let weighted = weighted || spec.objective.kind == ObjectiveKind::Dppo;
        let message =
            "expected `objective.importance` = \"truncate\" or \"mask\" as well: what is too old has to weigh less";
        self.that(
            asynchrony.staleness != StalenessKind::Accept || weighted,
            "asynchrony.staleness",
            kind,
            message,
            &["objective.importance", "objective.kind"],
        );
        self.groups(spec);
        let watchdog = &spec.watchdog;
        self.range("watchdog.stall_seconds", watchdog.stall_seconds, 30..=1_000_000);
        self.range("watchdog.task_seconds", watchdog.task_seconds, 30..=1_000_000);
        self.range("watchdog.max_stalls", watchdog.max_stalls, 1..=100);
    }

    fn groups(&mut self, spec: &JobSpec) {
        let groups = &spec.groups;
        self.range("groups.timeout_seconds", groups.timeout_seconds, 1..=1_000_000);
        self.range("groups.max_attempts", groups.max_attempts, 1..=100);
        self.range("groups.max_worker_losses", groups.max_worker_losses, 1..=100);
        if let Some(refills) = groups.max_refills {
            self.range("groups.max_refills", refills, 1..=1_000_000);
            let holds = groups.uniform == UniformKind::Refill;
            let message = "has no effect: only `groups.uniform` = \"refill\" refills groups";
            self.that(holds, "groups.max_refills", refills, message, &["groups.uniform"]);
        }
        let alone = spec.rollout.samples_per_prompt == 1 && groups.uniform != UniformKind::Keep;
        let name = match groups.uniform {
            UniformKind::Keep => "\"keep\"",
            UniformKind::Drop => "\"drop\"",
            UniformKind::Refill => "\"refill\"",
        };
        let message =
            "expected \"keep\": with `rollout.samples_per_prompt` = 1 the labels of a group are always the same";
        self.that(!alone, "groups.uniform", name, message, &["rollout.samples_per_prompt"]);
        let contrasts = spec.objective.filled().objective(spec.rollout.max_new_tokens).contrasts();
        let keeps = groups.uniform == UniformKind::Keep;
        let message = "expected \"keep\": this objective learns from a group whose labels and rewards are all the same, too \
                       (`ppo` and `reinforce_pp` compare beyond the group, a penalty with `objective.kl_place` = \"reward\" \
                       differs within it, `pacs` with `score` = \"naive\" or `actor_term` compares nothing, `real` has an anchor, and what `external` \
                       learns from is not known)";
        let also = &["objective.kind", "objective.kl_place", "objective.score", "objective.actor_term"];
        self.that(keeps || contrasts != Contrasts::Nothing, "groups.uniform", name, message, also);
    }
}

fn staleness_name(kind: StalenessKind) -> &'static str {
    match kind {
        StalenessKind::Wait => "\"wait\"",
        StalenessKind::Evict => "\"evict\"",
        StalenessKind::Accept => "\"accept\"",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    fn problems(more: &str) -> Vec<String> {
        let text = format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
             batch.prompts_per_step = 32\n{more}"
        );
        match crate::parse(&text, Path::new("job.toml")) {
            Ok(_) => Vec::new(),
            Err(errors) => errors.problems.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn settings_that_would_deadlock_are_refused_with_the_arithmetic() {
        for (more, expected) in [
            ("asynchrony = { max_lag = 1, slots = 64 }", None),
            ("asynchrony = { max_lag = 1, slots = 32 }", None),
            ("asynchrony.slots = 31", Some("expected 32 or more: a step takes 32 groups")),
            ("asynchrony = { max_lag = 1, slots = 65 }", Some("expected 64 or less, 2 x 32")),
            ("asynchrony.max_lag = 65", Some("expected 0 to 64")),
            ("asynchrony.staleness = 'evict'", Some("has no effect while `asynchrony.max_lag` is 0")),
            ("asynchrony = { max_lag = 1, staleness = 'accept' }", Some("expected `objective.importance`")),
            (
                "asynchrony = { max_lag = 1, staleness = 'accept' }\nobjective = { kind = 'grpo', importance = 'mask' }",
                None,
            ),
            ("asynchrony = { max_lag = 1, staleness = 'accept' }\nobjective.importance = 'mask'", None),
            ("asynchrony = { max_lag = 1, staleness = 'accept' }\nobjective.kind = 'dppo'", None),
            ("objective = { importance = 'mask', reference_reset_steps = 2 }", Some("the reference is an older one")),
            ("objective = { importance = 'mask', importance_level = 'token' }", Some("has no part of its own")),
            ("objective = { kind = 'dppo', importance = 'mask' }", Some("`dppo` would ignore it")),
            ("objective.kind = 'external'", Some("is required: the program")),
            ("objective = { kind = 'external', command = ['python3', 'mine.py'] }", None),
            ("objective.kind = 'grpo'\nobjective.importance = 'mask'\nbatch.old_logprobs = 'rollout'", Some("are 1")),
            (
                "objective = { kind = 'grpo', importance = 'mask' }\nbatch.old_logprobs = 'rollout'\nrollout.top_p = 0.9",
                None,
            ),
            (
                "objective = { kind = 'grpo', importance = 'mask' }\nbatch.old_logprobs = 'rollout'\nrollout.top_p = 0.9\n\
                 asynchrony = { max_lag = 1, staleness = 'accept' }",
                Some("do not see how old a token is"),
            ),
            ("groups.uniform = 'refill'", None),
            ("groups.uniform = 'drop'\nobjective.kind = 'real'", Some("expected \"keep\"")),
            ("groups.uniform = 'drop'\nobjective.kind = 'disco'", None),
            ("groups.uniform = 'drop'\nobjective.kind = 'reinforce_pp_baseline'", None),
            ("groups.uniform = 'drop'\nobjective.kind = 'reinforce_pp'", Some("compare beyond the group")),
            ("groups.uniform = 'refill'\nobjective.kind = 'ppo'", Some("compare beyond the group")),
            ("groups.uniform = 'drop'\nobjective.score = 'naive'", Some("compares nothing")),
            ("groups.uniform = 'drop'\nobjective.actor_term = true", Some("compares nothing")),
            ("groups.uniform = 'drop'\nobjective = { kind = 'grpo', kl_coefficient = 0.1 }", None),
            (
                "groups.uniform = 'drop'\nobjective = { kind = 'grpo', kl_coefficient = 0.1, kl_place = 'reward' }",
                Some("differs within it"),
            ),
            ("groups.max_refills = 5", Some("only `groups.uniform` = \"refill\"")),
            (
                "groups.uniform = 'drop'\nrollout.samples_per_prompt = 1\nobjective = { kind = 'reinforce_pp' }",
                Some("the labels of a group are always the same"),
            ),
            ("groups.timeout_seconds = 0", Some("expected 1 to 1000000")),
            ("watchdog = { stall_seconds = 30, task_seconds = 30, max_stalls = 100 }", None),
            ("watchdog.stall_seconds = 29", Some("expected 30 to 1000000")),
            ("watchdog.task_seconds = 1000001", Some("expected 30 to 1000000")),
            ("watchdog.max_stalls = 0", Some("expected 1 to 100")),
            ("data.train.weight = 2.0", Some("without `data.mix` there is no other set")),
            ("data.mix.more = { path = 'm.jsonl', weight = 0.5 }\ndata.train.weight = 2.0", None),
            ("data.mix.more = { path = 'm.jsonl', weight = 0.0 }", Some("expected above 0, at most 1000000")),
            ("data.mix.more = { path = 'm.txt' }", Some("expected a `.jsonl`, `.json`, `.csv`")),
            ("data.mix.more = { path = 'm.jsonl', wieght = 1.0 }", Some("did you mean `weight`?")),
            ("data.evaluation.weight = 2.0", Some("all held-out problems are measured")),
            ("data.retire_after = 1", None),
            ("data.retire_after = 0", Some("expected 1 to 1000")),
            ("data.retire_after = 1001", Some("expected 1 to 1000")),
            ("data.difficulty_floor = 0.01", None),
            ("data.difficulty_floor = 1.0", Some("expected 0.01 to below 1")),
            ("data.difficulty_floor = 0.009", Some("expected 0.01 to below 1")),
        ] {
            let found = problems(more);
            match expected {
                None => assert_eq!(found, [""; 0], "{more}"),
                Some(expected) => assert!(found.iter().any(|problem| problem.contains(expected)), "{more}: {found:?}"),
            }
        }
    }
}
