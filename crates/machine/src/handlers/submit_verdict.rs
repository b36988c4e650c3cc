use pacs_types::{GroupId, LeaseId, Role, SampleId, WorkerId};

use crate::machine::Machine;
use crate::pool::{Judgement, Taken};
use crate::{Counter, Reply};

impl Machine {
    pub(crate) fn submit_verdict(&mut self, worker: WorkerId, lease: LeaseId, sample: SampleId, judgement: Judgement) {
        if let Err(refusal) = self.member(worker, Role::Verifier) {
            return self.refuse(refusal);
        }
        let (now, attempts) = (self.now, self.options.max_attempts);
        let Some(pool) = self.pool_of(sample.group) else { return self.refuse_stale(lease, sample) };
        let taken = pool.take_verdict(lease, worker, sample, judgement, attempts, now);
        match taken {
            Taken::Fresh | Taken::Completes => {
                self.progress();
                self.reply(Reply::Accepted { fresh: true });
            }
            Taken::Repeat => {
                self.unchanged = true;
                self.reply(Reply::Accepted { fresh: false });
            }
            Taken::Again | Taken::GiveUp => {
                self.reply(Reply::Accepted { fresh: false });
                self.count(Counter::FailedVerdicts, 1);
                self.count(Counter::EvaluationFailedVerdicts, u64::from(self.is_measured(sample.group)));
            }
            Taken::Stale => self.refuse_stale(lease, sample),
        }
        if taken == Taken::GiveUp {
            self.give_up_sample(sample);
        }
        if taken == Taken::Completes {
            self.group_complete(sample.group);
        }
    }

    fn group_complete(&mut self, group: GroupId) {
        if crate::evaluation_problem(group).is_some() {
            return self.finish_evaluation_if_complete();
        }
        self.refill_if_uniform(group);
        self.try_train();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::*;
    use crate::{Counter, Dropped, Effect, End, EvaluationPlan, Event, Options, PhaseKind, SampleGrant, WantedSample};
    use pacs_types::{GroupId, Outcome, Role, SampleId};

    #[test]
    fn a_group_without_a_verdict_is_replaced_by_the_next_prompt() {
        let mut run = Run::sampling(Options { max_attempts: 2, ..options() });
        run.generate_all();
        let dropped = run.verify_all(|sample| match sample.group {
            GroupId(0) => Outcome::Failed,
            _ => Outcome::Correct,
        });
        assert!(dropped.contains(&Effect::DropGroup { group: GroupId(0), why: Dropped::NoVerdict }), "{dropped:?}");
        run.generate_all();
        let effects = run.verify_all(|_| Outcome::Wrong);
        assert_eq!(trained(&effects), Some((1, vec![GroupId(1), GroupId(2)])));
        assert_eq!(run.machine.status(run.now).counters[&Counter::DroppedGroups], 1);
    }

    #[test]
    fn a_sample_without_a_verdict_is_replaced_by_another_one() {
        let mut run = Run::sampling(Options { max_attempts: 2, max_replacements: 1, ..options() });
        run.generate_all();
        let odd = SampleId { group: GroupId(0), index: 1 };
        let effects = run.verify_all(|sample| if sample == odd { Outcome::TimedOut } else { Outcome::Correct });
        assert_eq!(effects.iter().filter(|effect| **effect == Effect::ReplaceSample(odd)).count(), 1, "{effects:?}");
        let grants = run.groups(run.rollout, 100);
        let [grant] = &grants[..] else { panic!("one group has a sample missing: {grants:?}") };
        assert_eq!((grant.group, &grant.samples[..]), (odd.group, &[WantedSample { index: 1, attempt: 1 }][..]));
        run.hand_in(grants);
        let effects = run.verify_all(|_| Outcome::Wrong);
        assert_eq!(trained(&effects), Some((1, vec![GroupId(0), GroupId(1)])));
        let counters = run.machine.status(run.now).counters;
        assert_eq!((counters[&Counter::ReplacedSamples], counters[&Counter::FailedVerdicts]), (1, 2));
        assert!(!counters.contains_key(&Counter::DroppedGroups));
    }

    /// Leases samples, and kills the verifier if `poison` is among them; judges them otherwise.
    fn verify_or_die(run: &mut Run, poison: SampleId) -> Vec<Effect> {
        let grants = run.samples();
        if grants.iter().any(|grant| grant.sample == poison) {
            let (verifier, effects) = run.register(Role::Verifier, "verifier-0");
            run.verifier = verifier;
            return effects;
        }
        let worker = run.verifier;
        let verdict = |SampleGrant { lease, sample }| Event::SubmitVerdict {
            worker,
            lease,
            sample,
            outcome: Outcome::Wrong,
            label: 0.0,
            reward: Some(0.0),
        };
        grants.into_iter().flat_map(|grant| run.step(verdict(grant))).collect()
    }

    #[test]
    fn an_answer_that_kills_verifiers_is_replaced_and_then_its_group_is_dropped() {
        let mut run = Run::sampling(Options { max_worker_losses: 3, max_replacements: 1, ..options() });
        let poison = SampleId { group: GroupId(0), index: 1 };
        let mut effects = Vec::new();
        for _ in 0..40 {
            run.generate_all();
            effects.extend(verify_or_die(&mut run, poison));
            // An accused sample is given up once the window for a mass loss is over.
            for _ in 0..=options().heartbeat_timeout.as_secs() {
                run.everybody_beats();
                run.now += Duration::from_secs(1);
                effects.extend(run.tick());
            }
        }
        let of = |wanted: &Effect| effects.iter().filter(|effect| *effect == wanted).count();
        assert_eq!(of(&Effect::ReplaceSample(poison)), 1);
        assert_eq!(of(&Effect::DropGroup { group: GroupId(0), why: Dropped::NoVerdict }), 1);
        let counters = run.machine.status(run.now).counters;
        assert_eq!(
            (counters[&Counter::DeadlySamples], counters[&Counter::LostWorkers]),
            (2, 6),
            "three deaths for each of them"
        );
        assert_eq!(trained(&effects).map(|(_, groups)| groups), Some(vec![GroupId(1), GroupId(2)]));
        let named = |effect: &Effect| matches!(effect, Effect::Note(note) if note.contains("3 verifiers died"));
        assert!(effects.iter().any(named), "{effects:?}");
    }

    #[test]
    fn replacements_are_bounded() {
        let mut run = Run::sampling(Options { max_attempts: 1, max_replacements: 2, ..options() });
        for round in 0..3 {
            run.generate_all();
            let effects = run.verify_all(|sample| match sample.group {
                GroupId(0) if sample.index == 0 => Outcome::Failed,
                _ => Outcome::Correct,
            });
            assert_eq!(
                effects.contains(&Effect::DropGroup { group: GroupId(0), why: Dropped::NoVerdict }),
                round == 2,
                "{effects:?}"
            );
        }
    }

    #[test]
    fn an_evaluation_leaves_such_a_group_out() {
        let plan = EvaluationPlan { problems: 3, samples_per_problem: 1, every_steps: 0, before: true, after: false };
        let mut run = Run::sampling(Options { max_attempts: 1, max_replacements: 2, evaluation: plan, ..options() });
        run.generate_all();
        let effects = run.verify_all(|sample| match crate::evaluation_problem(sample.group) {
            Some(1) => Outcome::TimedOut,
            _ => Outcome::Correct,
        });
        let evaluated = effects.iter().find_map(|effect| match effect {
            Effect::Evaluated { step: 0, groups, excluded, .. } => Some((groups.len(), *excluded)),
            _ => None,
        });
        assert_eq!(evaluated, Some((2, 1)), "{effects:?}");
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling);
    }

    #[test]
    fn a_broken_verifier_ends_the_run_with_a_reason() {
        let mut run = Run::sampling(Options { max_attempts: 1, ..options() });
        for _ in 0..20 {
            run.generate_all();
            let effects = run.verify_all(|_| Outcome::Failed);
            let failed = effects.iter().find_map(|effect| match effect {
                Effect::Ended(End::Failed { reason }) => Some(reason.clone()),
                _ => None,
            });
            if let Some(reason) = failed {
                assert!(reason.contains("verif"), "{reason}");
                return;
            }
        }
        panic!("the run continued");
    }
}
