//! The watchdog: when the run makes no progress, it names what is stuck, acts on it, and after some tries ends the run
//! with that sentence.
//!
//! Progress means a new sample, verdict, step, evaluation or checkpoint. A registration or a repeated lease does not
//! count, because a stuck run would produce those for ever. Learner tasks have a separate timeout
//! ([`Event::TaskOverdue`](crate::Event)), because a step may legitimately take longer than a sample.

use pacs_types::{Role, WorkerId};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::worker_loss::Departure;
use crate::{Counter, Effect, Event};

impl Machine {
    /// Records progress, which ends a series of stalls.
    pub(crate) fn progress(&mut self) {
        self.progressed = self.now;
        self.stalls = 0;
    }

    /// The event that is due when the run has made no progress for `stall_timeout`.
    pub(crate) fn stall_due(&self) -> Option<Event> {
        // Ranks on a task have a separate timeout, and a paused run waits for its operator.
        let is_watched = !self.paused && !self.is_ended() && self.phase.task().is_none();
        let limit = self.now.checked_sub(self.options.stall_timeout)?;
        (is_watched && self.progressed < limit).then_some(Event::Stalled)
    }

    /// Acts on what is stuck, or ends the run.
    pub(crate) fn stalled(&mut self) {
        if !self.note_stall(self.options.stall_timeout.as_secs()) {
            return;
        }
        self.progressed = self.now;
        match &self.phase {
            Phase::Assembling => {
                self.restart_all("has not asked for a place in the next generation", |machine, worker| {
                    machine.workers.get(worker).is_some_and(|member| member.role == Role::Learner && !member.joining)
                })
            }
            Phase::Evaluating(_) | Phase::Sampling | Phase::Ahead(_) if self.stalls > 1 => {
                self.restart_all("holds work that nothing comes of", Self::is_stuck);
            }
            Phase::Evaluating(_) | Phase::Sampling | Phase::Ahead(_) => {
                let loans: usize = self.pools_mut().map(crate::pool::Pool::end_all_loans).sum();
                self.count(Counter::LapsedLeases, loans as u64);
            }
            // A commit is up to the disk, and ranks on a task have a separate timeout.
            Phase::Committing | Phase::Preparing(_) | Phase::Training(_) | Phase::Saving(_) | Phase::Ended(_) => {}
        }
    }

    /// Counts a stall and reports what is stuck. Returns false if it was one too many and the run has ended.
    pub(crate) fn note_stall(&mut self, seconds: u64) -> bool {
        let what = self.waiting_for(self.now);
        self.stalls += 1;
        self.count(Counter::Stalls, 1);
        if self.stalls > self.options.max_stalls {
            let tries = self.options.max_stalls;
            self.fail(format!("nothing has happened for {seconds} s, after {tries} attempts to recover: {what}"));
            return false;
        }
        let (tried, most) = (self.stalls, self.options.max_stalls);
        self.effects
            .push(Effect::Note(format!("nothing has happened for {seconds} s (try {tried} of {most}): {what}")));
        true
    }

    /// Removes stuck workers and has them restarted; each is told with its next heartbeat.
    pub(crate) fn restart_all(&mut self, why: &str, is_stuck: impl Fn(&Self, WorkerId) -> bool) {
        let stuck: Vec<WorkerId> = self.workers.ids().filter(|worker| is_stuck(self, *worker)).collect();
        for worker in stuck {
            self.restarting.insert(worker);
            if self.restarting.len() > crate::worker::MOST_REMEMBERED {
                self.restarting.pop_first();
            }
            self.lose_worker(worker, Departure::Stuck(why));
        }
    }

    /// Whether a worker holds work, or leaves work waiting that it should have leased.
    fn is_stuck(&self, worker: WorkerId) -> bool {
        let Some(member) = self.workers.get(worker) else { return false };
        let holds = self.pools().any(|pool| pool.loans_of(worker) > 0);
        let depths: Vec<_> = self.pools().map(crate::pool::Pool::depths).collect();
        let waits = match member.role {
            Role::Rollout => depths.iter().any(|depths| depths.groups_waiting > 0),
            Role::Verifier => depths.iter().any(|depths| depths.samples_waiting > 0),
            Role::Learner => false,
        };
        holds || waits
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::handlers::testing::*;
    use crate::{Command, Directive, Effect, End, Options, PhaseKind};
    use pacs_types::Outcome;

    fn watched() -> Options {
        Options { stall_timeout: Duration::from_secs(30), max_stalls: 3, total_steps: 5, ..options() }
    }

    /// Lets seconds pass in which every worker sends heartbeats; returns the effects.
    fn live(run: &mut Run, seconds: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..seconds {
            run.now += Duration::from_secs(1);
            effects.extend(run.tick());
            run.beat_if_members();
        }
        effects
    }

    fn notes(effects: &[Effect]) -> Vec<&str> {
        effects
            .iter()
            .filter_map(|effect| if let Effect::Note(note) = effect { Some(note.as_str()) } else { None })
            .collect()
    }

    #[test]
    fn stalled_work_is_reissued_then_its_holder_restarted_then_the_run_ended() {
        let mut run = Run::sampling(watched());
        run.groups(run.rollout, 100);
        let effects = live(&mut run, 31);
        assert!(
            notes(&effects)[0].starts_with("nothing has happened for 30 s (try 1 of 3): step 1 waits for"),
            "{effects:?}"
        );
        assert_eq!(run.machine.status(run.now).queues.groups_waiting, 2, "the leases have ended");

        run.groups(run.rollout, 100);
        let stuck = run.rollout;
        let effects = live(&mut run, 31);
        assert!(notes(&effects)[0].contains("(try 2 of 3)") && notes(&effects)[0].contains("held by rollout-0"));
        assert_eq!(run.told(stuck), Directive::Restart);
        // The others have nothing to do and are left alone.
        let verifier = run.verifier;
        assert_eq!(run.told(verifier), Directive::Continue);

        live(&mut run, 31);
        let effects = live(&mut run, 31);
        let Some(Effect::Ended(End::Failed { reason })) = effects.last() else { panic!("{effects:?}") };
        assert!(reason.starts_with("nothing has happened for 30 s, after 3 attempts to recover: step 1 waits for"));
        assert!(reason.contains("a rollout worker, but none is registered"), "{reason}");
    }

    #[test]
    fn progress_ends_the_count() {
        let mut run = Run::sampling(watched());
        for _ in 0..6 {
            live(&mut run, 31);
            assert_eq!(run.machine.stalls, 1);
            run.full_step();
            assert_eq!(run.machine.stalls, 0);
            if run.machine.ended().is_some() || run.machine.status(run.now).phase == PhaseKind::Saving {
                return;
            }
        }
        panic!("the run has five steps");
    }

    #[test]
    fn a_verifier_that_does_not_poll_is_restarted() {
        let mut run = Run::sampling(watched());
        run.generate_all();
        live(&mut run, 62);
        let (verifier, rollout) = (run.verifier, run.rollout);
        assert_eq!(run.told(verifier), Directive::Restart);
        assert_eq!(run.told(rollout), Directive::Continue);
    }

    #[test]
    fn a_missing_learner_is_restarted() {
        let mut run = Run::new(watched());
        let learner = run.register(pacs_types::Role::Learner, "learner-0").0;
        run.learners = vec![learner];
        live(&mut run, 31);
        assert_eq!(run.told(learner), Directive::Restart);
    }

    #[test]
    fn a_paused_run_is_not_stuck_and_its_time_does_not_count() {
        let mut run = Run::sampling(watched());
        run.command(Command::Pause).unwrap();
        assert_eq!(notes(&live(&mut run, 200)), [""; 0]);
        run.command(Command::Resume).unwrap();
        assert_eq!(notes(&live(&mut run, 29)), [""; 0]);
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Training);
    }

    #[test]
    fn ranks_that_do_not_report_are_restarted() {
        let mut run = Run::preparing(Options { task_timeout: Duration::from_secs(50), ..watched() });
        let learner = run.learners[0];
        assert_eq!(notes(&live(&mut run, 49)), [""; 0], "the clock of tasks is another one");
        let effects = live(&mut run, 2);
        assert!(notes(&effects)[0].contains("waits for learner learner-0 to load their state"), "{effects:?}");
        assert_eq!((run.told(learner), run.machine.status(run.now).phase), (Directive::Restart, PhaseKind::Assembling));
    }

    #[test]
    fn a_stall_is_in_the_status_line_within_thirty_seconds() {
        let mut run = Run::sampling(watched());
        live(&mut run, 20);
        let status = run.machine.status(run.now);
        assert!(status.waiting_for.ends_with("; nothing has happened for 20.0 s"), "{}", status.waiting_for);
        assert_eq!(status.stalled, Duration::from_secs(20));
    }
}
