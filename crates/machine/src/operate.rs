//! Operator commands on a running job.

use std::time::Duration;

use pacs_types::Role;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::roster::Roster;
use crate::worker::Drain;
use crate::{Command, End, Refusal, Reply, StopMode};

/// Number of actions that the status shows.
const SHOWN_ACTIONS: usize = 16;

/// A command that an operator has given, for the status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// Identity of the operator.
    pub who: String,
    /// Wall-clock time, in seconds since 1970.
    pub at: u64,
    /// What was done, for people.
    pub what: String,
}

impl Machine {
    pub(crate) fn operate(&mut self, who: String, at: u64, command: Command) {
        let what = match self.command(command) {
            Ok(what) => what,
            Err(problem) => return self.refuse(Refusal::BadCommand { problem }),
        };
        self.reply(Reply::Done);
        if self.actions.len() == SHOWN_ACTIONS {
            self.actions.pop_front();
        }
        self.actions.push_back(Action { who, at, what });
    }

    /// The last command that was carried out; `None` before the first.
    #[must_use]
    pub fn newest_action(&self) -> Option<&Action> {
        self.actions.back()
    }

    /// Carries out a command. Returns what was done, or why the run refuses it.
    fn command(&mut self, command: Command) -> Result<String, String> {
        // Stopping an ended run succeeds, because the caller has what it wants.
        if self.is_ended() && !matches!(command, Command::Stop(_)) {
            return Err("the run is over".to_owned());
        }
        match command {
            Command::Pause => {
                self.paused = true;
                Ok("paused the run".to_owned())
            }
            Command::Resume => {
                self.paused = false;
                self.progressed = self.now;
                self.fill();
                self.try_train();
                Ok("resumed the run".to_owned())
            }
            Command::Checkpoint => self.checkpoint_now(),
            Command::Drain { worker } => self.drain(&worker),
            Command::Stop(mode) => {
                self.request_stop(mode);
                Ok(match mode {
                    StopMode::Save => "stopped the run at the next safe point".to_owned(),
                    StopMode::AfterStep => "stopped the run after the step in work".to_owned(),
                    StopMode::Now => "stopped the run at once".to_owned(),
                })
            }
            Command::SetSlots(slots) => self.set_slots(slots),
            Command::SetLogLevel(level) => {
                self.position.log_level = Some(level);
                Ok(format!("set log_level to {}", level.name()))
            }
            Command::SetLearningRate(rate) => {
                if !(rate > 0.0 && rate <= 1.0) {
                    return Err(format!("learning_rate = {rate}: expected above 0, at most 1"));
                }
                self.position.learning_rate = Some(rate);
                Ok(format!("set learning_rate = {rate:e}"))
            }
        }
    }

    fn checkpoint_now(&mut self) -> Result<String, String> {
        let step = self.position.step;
        let is_on_its_way = self.writing.as_ref().is_some_and(|writing| writing.snapshot.step == step);
        if is_on_its_way && self.phase.training().is_none() {
            return Ok(format!("asked for the checkpoint of step {step}, which is being written"));
        }
        if self.position.step <= self.restart.step && self.phase.training().is_none() {
            let step = self.restart.step;
            return Err(format!("there is nothing to save: no step was made since step {step}"));
        }
        self.checkpoint_wanted = true;
        if matches!(self.phase, Phase::Sampling) {
            self.advance();
        }
        Ok("asked for a checkpoint".to_owned())
    }

    fn drain(&mut self, name: &str) -> Result<String, String> {
        let found: Vec<_> = self.workers.find_all(name).into_iter().map(|(id, worker)| (id, worker.role)).collect();
        let (id, role) = match found[..] {
            [] => return Err(format!("there is no worker `{name}`; `pacs status` lists them")),
            [one] => one,
            _ => {
                return Err(format!(
                    "workers of {} roles have the name `{name}`; start them under names of their own",
                    found.len()
                ));
            }
        };
        if role == Role::Learner {
            let is_counted = self.workers.get(id).is_some_and(|worker| worker.draining().is_none());
            let stay = self.workers.staying(Role::Learner) - usize::from(is_counted);
            let least = self.options.min_learners;
            if stay < least as usize {
                return Err(format!(
                    "`{name}` is a learner, and without it {stay} would be left of the {least} that \
                     resources.min_learners wants; `pacs stop` saves the run and ends it"
                ));
            }
        }
        self.workers.drain(id, Drain::Operator);
        self.release_rank(id);
        Ok(format!("drained {name}"))
    }

    fn set_slots(&mut self, slots: u32) -> Result<String, String> {
        let (per_step, lag) = (self.options.prompts_per_step, self.options.max_lag);
        let most = per_step.saturating_mul(lag + 1);
        if !(per_step..=most).contains(&slots) {
            return Err(format!(
                "slots = {slots}: expected {per_step} to {most}: a step takes {per_step} groups, and with \
                 asynchrony.max_lag = {lag} more than ({lag} + 1) x {per_step} in flight would grow too old"
            ));
        }
        self.options.slots = slots;
        self.fill();
        Ok(format!("set slots = {slots}"))
    }

    /// Ends the run as soon as the mode allows. Samples are kept for the next process of the run.
    pub(crate) fn request_stop(&mut self, mode: StopMode) {
        if self.is_ended() {
            return;
        }
        // A pending stop can be made more urgent, but not withdrawn.
        let hurried = |mode: &StopMode| match mode {
            StopMode::AfterStep => 0,
            StopMode::Save => 1,
            StopMode::Now => 2,
        };
        if self.stop.is_some_and(|earlier| hurried(&earlier) >= hurried(&mode)) {
            return;
        }
        self.stop = Some(mode);
        // Without leases it cannot be completed. `StopMode::Now` discards it with the end of the run.
        if mode != StopMode::Now && !self.may_lend() {
            self.abandon_evaluation();
        }
        match (mode, &self.phase) {
            // Files that are already written become a checkpoint first; otherwise the next process would not find them.
            (StopMode::Now, _) if self.committing().is_some() => self.wait_for_writing(),
            (StopMode::Now, _) => self.end(End::Stopped),
            (_, Phase::Committing) => {}
            (_, Phase::Evaluating(_)) => {
                self.interrupt();
                self.advance();
            }
            (_, Phase::Assembling | Phase::Preparing(_)) => self.advance(),
            (StopMode::Save, Phase::Sampling) => self.advance(),
            // A paused run forms no batch, so it cannot finish the step that it samples, and saves what is trained.
            (StopMode::AfterStep, Phase::Sampling) if self.paused => self.advance(),
            (_, Phase::Ahead(_)) if self.concurrent.is_none() => self.finish_step(),
            // These end by themselves, and `next` then chooses a save.
            (StopMode::AfterStep, Phase::Sampling)
            | (
                StopMode::Save | StopMode::AfterStep,
                Phase::Training(_) | Phase::Ahead(_) | Phase::Saving(_) | Phase::Ended(_),
            ) => {}
        }
    }

    /// Continues after an end, from the last checkpoint and the samples that its weights or older ones generated.
    pub(crate) fn reopen(&mut self) {
        self.reply(Reply::Done);
        let Phase::Ended(end) = &self.phase else {
            // The process died before it journaled the end of a stop. Whoever starts it
            // again wants the run to continue.
            self.stop = None;
            if matches!(self.phase, Phase::Assembling | Phase::Sampling) {
                self.advance();
            }
            return;
        };
        if *end == End::Finished && (self.options.evaluation_only || self.position.step >= self.options.total_steps) {
            return;
        }
        let workers: Vec<_> = self.workers.ids().collect();
        for worker in workers {
            self.revoke_worker(worker);
        }
        self.workers = Roster::default();
        (self.team, self.weights, self.stop) = (None, None, None);
        (self.lost_generations, self.lost_saves, self.paused, self.checkpoint_wanted) = (0, 0, false, false);
        self.regroup_reason.clear();
        self.phase_since = Duration::ZERO;
        self.progress();
        if self.options.evaluation_only {
            self.take_own_weights();
            return self.advance();
        }
        // Files that are already written become a checkpoint first, and the job resumes from that.
        if self.committing().is_some() {
            return self.wait_for_writing();
        }
        self.writing = None;
        self.rewind();
        self.advance();
    }
}

#[cfg(test)]
mod tests {
    use crate::handlers::testing::*;
    use crate::{Command, Effect, End, Event, LogLevel, Options, PhaseKind, Refusal, Reply, StopMode};
    use pacs_types::{GroupId, Outcome};

    #[test]
    fn a_pause_gives_out_nothing_and_keeps_what_comes() {
        let mut run = Run::sampling(options());
        let held = run.groups(run.rollout, 100);
        run.command(Command::Pause).unwrap();
        run.hand_in(held);
        assert!(run.verify_all(|_| Outcome::Correct).is_empty(), "no sample is leased");
        run.command(Command::Resume).unwrap();
        let effects = run.verify_all(|_| Outcome::Correct);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Train { step: 1, .. })), "{effects:?}");
        let whats: Vec<_> = run.machine.status(run.now).actions.into_iter().map(|action| action.what).collect();
        assert_eq!(whats, ["paused the run", "resumed the run"]);
    }

    #[test]
    fn a_stop_during_sampling_saves_the_last_step_and_keeps_the_groups() {
        let mut run = Run::sampling(Options { total_steps: 5, ..options() });
        run.full_step();
        run.generate_all();
        run.command(Command::Stop(StopMode::Save)).unwrap();
        let effects = run.save();
        let Some(Effect::CommitCheckpoint { snapshot, model: false, .. }) = effects.last() else {
            panic!("{effects:?}")
        };
        let drawn_again = [2, 3].map(GroupId).into();
        assert_eq!((snapshot.step, &snapshot.requeued), (1, &drawn_again), "without the journal");
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        assert_eq!(run.machine.present().count(), 4);

        run.step(Event::Reopened);
        run.join_again();
        run.prepare();
        let effects = run.verify_all(|_| Outcome::Correct);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Train { step: 2, .. })), "{effects:?}");
    }

    #[test]
    fn a_stop_with_nothing_to_save_is_immediate() {
        for mut run in [Run::new(options()), Run::preparing(options()), Run::sampling(options())] {
            let effects = run.step(stop(StopMode::Save));
            assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        }
    }

    #[test]
    fn a_stop_after_the_step_finishes_it() {
        let mut run = Run::sampling(Options { max_lag: 1, slots: 4, total_steps: 5, ..options() });
        run.command(Command::Stop(StopMode::AfterStep)).unwrap();
        run.full_step();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let effects = run.step(stop(StopMode::Now));
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)), "a stop can be hurried");
    }

    #[test]
    fn a_drained_worker_finishes_what_it_holds() {
        let mut run = Run::sampling(options());
        let held = run.groups(run.rollout, 2);
        run.command(Command::Drain { worker: "rollout-0".into() }).unwrap();
        assert_eq!(run.groups(run.rollout, 100), []);
        let worker = run.rollout;
        let beat = Event::Heartbeat { worker, activity: String::new() };
        assert_eq!(run.call(beat.clone()), Ok(Reply::Directive(crate::Directive::Continue)));
        run.hand_in(held);
        let step = run.whole_step(beat);
        assert_eq!(step.answer, Ok(Reply::Directive(crate::Directive::Leave)));
        assert_eq!(step.effects, [Effect::Drained { name: "rollout-0".into() }]);
        for name in ["learner-0", "nobody"] {
            let refused = run.command(Command::Drain { worker: name.into() });
            assert!(matches!(refused, Err(Refusal::BadCommand { .. })), "{name}: {refused:?}");
        }
    }

    #[test]
    fn a_checkpoint_is_made_between_two_tasks() {
        let mut run = Run::sampling(Options { total_steps: 5, ..options() });
        assert!(run.command(Command::Checkpoint).is_err(), "nothing to save");
        run.full_step();
        run.command(Command::Checkpoint).unwrap();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        run.save();
        run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling);
    }

    #[test]
    fn settings_are_checked() {
        let mut run = Run::sampling(Options { max_lag: 2, slots: 4, ..options() });
        for slots in [1, 7] {
            let refusal = run.command(Command::SetSlots(slots)).unwrap_err().to_string();
            assert!(refusal.contains("expected 2 to 6"), "{refusal}");
        }
        run.command(Command::SetSlots(6)).unwrap();
        assert_eq!(run.machine.in_flight(), 6);
        assert!(run.command(Command::SetLearningRate(2.0)).is_err());
        run.command(Command::SetLogLevel(LogLevel::Debug)).unwrap();
        let said = run.machine.status(run.now).actions.pop().unwrap().what;
        assert_eq!(
            (said.as_str(), run.machine.position().log_level),
            ("set log_level to debug", Some(LogLevel::Debug))
        );
        run.command(Command::SetLearningRate(2e-5)).unwrap();
        assert_eq!(run.machine.position().learning_rate, Some(2e-5));
    }
}
