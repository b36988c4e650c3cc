//! Which prompt is drawn next, and what is remembered of those that were trained on.
//!
//! Draws are counted, and the group of a draw has its number. A job that is set back to a checkpoint makes the draws behind
//! it again, by the history that it had there, so that they come out as they did. Only the draws of groups that are still
//! there, or were drawn before the checkpoint, are not decided again.

use std::sync::Arc;

use pacs_order::{DrawOrder, Evidence};
use pacs_types::GroupId;

use crate::machine::Machine;
use crate::phase::Phase;
use crate::pool::{EVALUATION_GROUPS, Group};
use crate::{Counter, Effect, Snapshot};

/// The order of draws, worked out when it is first asked for. It follows from the options, so machines do not differ in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Order(Option<Arc<DrawOrder>>);

impl PartialEq for Order {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Machine {
    /// The next prompt.
    pub(crate) fn draw(&mut self) -> GroupId {
        if let Some(group) = self.position.requeued.pop_first() {
            return group;
        }
        let position = &mut self.position;
        let Some(curriculum) = &self.options.curriculum else { return position.draw_any() };
        let order = self.order.0.get_or_insert_with(|| Arc::new(DrawOrder::new(curriculum.plan.clone())));
        let ahead = &position.ahead;
        let draw = curriculum.next(order, &mut position.history, position.cursor, |group| ahead.contains(&group));
        position.cursor = draw.cursor;
        position.ahead = position.ahead.split_off(&GroupId(draw.cursor));
        self.count(Counter::SkippedDraws, draw.skipped);
        self.note_reopened(draw.reopened);
        draw.group
    }

    fn note_reopened(&mut self, problems: usize) {
        if problems == 0 {
            return;
        }
        self.count(Counter::ReopenedProblems, problems as u64);
        self.effects.push(Effect::Note(format!(
            "{problems} retired problems are drawn again: fewer others were left than a step takes (data.retire_after)"
        )));
    }

    /// Notes how a complete group has come out, for when the step is made.
    pub(crate) fn note_evidence(&mut self, id: GroupId, group: &Group) {
        if self.options.curriculum.is_some() {
            self.position.history.note(id, Evidence::of(group.judged_labels()));
        }
    }

    /// Takes the groups of the step that is made into the history.
    pub(crate) fn settle_history(&mut self) {
        let (Some(curriculum), Phase::Training(training)) = (&self.options.curriculum, &self.phase) else { return };
        for (id, group) in &training.groups {
            self.position.history.note(*id, Evidence::of(group.judged_labels()));
        }
        let order = self.order.0.get_or_insert_with(|| Arc::new(DrawOrder::new(curriculum.plan.clone())));
        self.position.history.settle(|group| order.index_at(group.0));
        let reopened = curriculum.reopen_if_few_are_left(&mut self.position.history);
        self.note_reopened(reopened);
    }

    /// Problems that are not drawn any more because they are solved; none: the job does not retire any.
    #[must_use]
    pub fn retired_problems(&self) -> Option<usize> {
        let curriculum = self.options.curriculum.as_ref().filter(|curriculum| curriculum.retire_after.is_some())?;
        Some(curriculum.retired(&self.position.history))
    }
}

impl Snapshot {
    /// The next draw, whatever it is about.
    fn draw_any(&mut self) -> GroupId {
        self.skip_ahead();
        let group = GroupId(self.cursor);
        self.cursor += 1;
        group
    }

    fn skip_ahead(&mut self) {
        while self.ahead.remove(&GroupId(self.cursor)) {
            self.cursor += 1;
        }
    }

    /// Where the job stands if `groups`, which were drawn, had not been sampled: they are the first to be.
    pub(crate) fn without(mut self, groups: impl IntoIterator<Item = GroupId>) -> Self {
        self.requeued.extend(groups);
        self
    }

    /// Never draws these groups again, which are in flight, nor those that are set aside, although the draws behind the
    /// cursor are made again.
    pub(crate) fn pass_over(&mut self, in_flight: impl Iterator<Item = GroupId>) {
        let set_aside = self.set_aside.keys().copied().filter(|group| group.0 < EVALUATION_GROUPS);
        for group in in_flight.chain(set_aside) {
            self.requeued.remove(&group);
            if group.0 >= self.cursor {
                self.ahead.insert(group);
            }
        }
        self.skip_ahead();
    }
}

#[cfg(test)]
mod tests;
