//! What a run does next, decided whenever nothing is in flight.

use pacs_types::{GroupId, Purpose, WeightVersion};

use crate::machine::Machine;
use crate::phase::{Phase, Task, Team};
use crate::round::{EVALUATION_GROUPS, Round};
use crate::worker::name_order;
use crate::{Effect, End, TaskKind};

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    Assemble,
    Evaluate,
    Sample,
    Save { model: bool },
    End(End),
}

impl Machine {
    /// Goes on from a point between two tasks.
    pub(crate) fn advance(&mut self) {
        match self.next() {
            Next::Assemble => {
                self.enter(Phase::Assembling);
                self.try_assemble();
            }
            Next::Evaluate => self.begin_evaluation(),
            Next::Sample => self.begin_sampling(),
            Next::Save { model } => self.begin_save(model),
            Next::End(end) => self.end(end),
        }
    }

    fn next(&self) -> Next {
        let step = self.position.step;
        let is_last = step >= self.options.total_steps;
        let is_unsaved = step > self.restart.step;
        if is_last && self.exported && !is_unsaved {
            return Next::End(End::Finished);
        }
        if self.stop_requested && !is_unsaved {
            return Next::End(End::Stopped);
        }
        if self.team.is_none() {
            return Next::Assemble;
        }
        if self.stop_requested {
            return Next::Save { model: false };
        }
        let every = self.options.checkpoint_every_steps;
        if is_unsaved && !is_last && every > 0 && step.is_multiple_of(every) && self.save_tried != Some(step) {
            return Next::Save { model: false };
        }
        if self.options.evaluation.is_due(step, self.options.total_steps) && !self.evaluated.contains(&step) {
            return Next::Evaluate;
        }
        if is_last { Next::Save { model: true } } else { Next::Sample }
    }

    /// Forms a generation when enough learners have asked for one.
    pub(crate) fn try_assemble(&mut self) {
        if !matches!(self.phase, Phase::Assembling) {
            return;
        }
        let mut joining: Vec<_> = self.workers.iter().filter(|(_, worker)| worker.joining).collect();
        if joining.len() < self.options.learners as usize {
            return;
        }
        joining.sort_by_key(|(_, worker)| name_order(&worker.name));
        joining.truncate(self.options.learners as usize);
        let ranks = joining.iter().map(|(id, _)| **id).collect();
        let names = joining.iter().map(|(_, worker)| worker.name.clone()).collect();
        self.newest_generation = self.newest_generation.next();
        let generation = self.newest_generation;
        self.team = Some(Team { generation, ranks });
        self.effects.push(Effect::GenerationFormed { generation, names });
        let task = self.new_task(TaskKind::Prepare);
        self.enter(Phase::Preparing(task));
    }

    pub(crate) fn new_task(&mut self, kind: TaskKind) -> Task {
        Task { id: self.next_id(), kind, done: Default::default(), skipped_updates: 0 }
    }

    fn begin_evaluation(&mut self) {
        let plan = self.options.evaluation;
        let mut round =
            Round::new(Purpose::Evaluate, self.policy_version(), plan.problems as usize, self.position.cursor);
        for problem in 0..u64::from(plan.problems) {
            round.add(GroupId(EVALUATION_GROUPS + problem), plan.samples_per_problem, self.now);
        }
        self.enter(Phase::Sampling(round));
    }

    fn begin_sampling(&mut self) {
        let wanted = self.options.prompts_per_step;
        let mut round = Round::new(Purpose::Train, self.policy_version(), wanted as usize, self.position.cursor);
        for _ in 0..wanted {
            round.add(self.draw_group(), self.options.samples_per_prompt, self.now);
        }
        self.enter(Phase::Sampling(round));
    }

    /// The next prompt of the data cursor, as a group. The cursor goes back if the round is abandoned (see `rewind`).
    pub(crate) fn draw_group(&mut self) -> GroupId {
        let group = GroupId(self.position.cursor);
        self.position.cursor += 1;
        group
    }

    fn policy_version(&self) -> WeightVersion {
        WeightVersion(self.position.step)
    }

    fn begin_save(&mut self, model: bool) {
        let step = self.position.step;
        self.save_tried = Some(step);
        let task = self.new_task(TaskKind::Save { step, model });
        self.enter(Phase::Saving(task));
        self.effects.push(Effect::CreateCheckpoint { step });
    }

    /// Goes on when a round has all it needs.
    pub(crate) fn finish_round_if_complete(&mut self) {
        let Phase::Sampling(round) = &self.phase else { return };
        if !round.is_complete() {
            return;
        }
        let groups = round.group_ids();
        if round.purpose == Purpose::Evaluate {
            let excluded = u32::try_from(round.dropped).expect("dropped groups are among the problems, a u32");
            let step = self.position.step;
            self.evaluated.insert(step);
            self.effects.push(Effect::Evaluated { step, groups, excluded });
            return self.advance();
        }
        let (pass_rate, mixed_share) = round.pass_rate_and_mixed_share();
        let collapsed = mixed_share == 0.0 && pass_rate < COLLAPSED_PASS_RATE;
        self.position.collapsed_steps = if collapsed { self.position.collapsed_steps + 1 } else { 0 };
        if self.position.collapsed_steps >= COLLAPSED_STEPS {
            return self.fail(format!(
                "for {COLLAPSED_STEPS} steps in a row no group had both right and wrong answers, and only {:.1} % of \
                 the answers of step {} were right: there is nothing left to learn from; look at the samples, then \
                 start from an earlier checkpoint with easier problems or a smaller learning rate",
                100.0 * pass_rate,
                self.position.step + 1
            ));
        }
        let step = self.position.step + 1;
        let task = self.new_task(TaskKind::Train { step });
        self.enter(Phase::Training(task));
        self.effects.push(Effect::Train { step, groups, ranks: self.options.learners });
    }

    pub(crate) fn fail(&mut self, reason: String) {
        self.end(End::Failed { reason });
    }

    pub(crate) fn end(&mut self, end: End) {
        self.enter(Phase::Ended(end.clone()));
        self.effects.push(Effect::Ended(end));
    }
}

/// Steps in a row without a mixed group and with hardly a right answer, after which a run fails.
const COLLAPSED_STEPS: u64 = 10;
/// Share of right answers below which a step without mixed groups counts.
const COLLAPSED_PASS_RATE: f64 = 0.05;
