//! Which prompt is drawn next, and the history that the curriculum keeps of trained groups.
//!
//! A group's id is the number of its draw. A job that rewinds to a checkpoint repeats the draws after it with the
//! history that it had there, so they come out the same. Draws whose groups are still in flight, or that were made
//! before the checkpoint, are not decided again.

use std::sync::Arc;

use pacs_order::{DrawOrder, Evidence};
use pacs_types::GroupId;

use crate::machine::Machine;
use crate::pool::{EVALUATION_GROUPS, Group};
use crate::{Counter, Effect, Snapshot};

/// The seeded draw order, computed on first use. It is a function of the options, so machines never differ in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Order(Option<Arc<DrawOrder>>);

impl PartialEq for Order {
    // A cache is no state: machines are equal whether or not theirs is filled.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Machine {
    /// Draws the next prompt: requeued groups first, then the cursor.
    pub(crate) fn draw(&mut self) -> GroupId {
        // These draws were taken once, so the curriculum is not asked about them again.
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

    /// Notes the labels of a complete group; they enter the history when its step is done.
    pub(crate) fn note_evidence(&mut self, id: GroupId, group: &Group) {
        if self.options.curriculum.is_some() {
            self.position.history.note(id, Evidence::of(group.judged_labels()));
        }
    }

    /// Moves the groups of the finished step into the curriculum's history.
    pub(crate) fn settle_history(&mut self) {
        let (Some(curriculum), Some(training)) = (&self.options.curriculum, self.phase.training()) else { return };
        for (id, group) in &training.groups {
            self.position.history.note(*id, Evidence::of(group.judged_labels()));
        }
        let order = self.order.0.get_or_insert_with(|| Arc::new(DrawOrder::new(curriculum.plan.clone())));
        self.position.history.settle(|group| order.index_at(group.0));
        let reopened = curriculum.reopen_if_few_are_left(&mut self.position.history);
        self.note_reopened(reopened);
    }

    /// Problems that are no longer drawn because they count as solved; `None` when the job retires none.
    #[must_use]
    pub fn retired_problems(&self) -> Option<usize> {
        let curriculum = self.options.curriculum.as_ref().filter(|curriculum| curriculum.retire_after.is_some())?;
        Some(curriculum.retired(&self.position.history))
    }
}

impl Snapshot {
    /// Returns the group at the cursor without asking the curriculum, and advances the cursor.
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

    /// The position as if `groups` had never been sampled: they are requeued and drawn first.
    pub(crate) fn without(mut self, groups: impl IntoIterator<Item = GroupId>) -> Self {
        self.requeued.extend(groups);
        self
    }

    /// Marks the draws of in-flight and quarantined groups as over, so that they are not repeated although the cursor
    /// was set back before them.
    pub(crate) fn pass_over(&mut self, in_flight: impl Iterator<Item = GroupId>) {
        let set_aside = self.set_aside.keys().copied().filter(|group| group.0 < EVALUATION_GROUPS);
        for group in in_flight.chain(set_aside) {
            self.requeued.remove(&group);
            // Draws before the cursor are decided already.
            if group.0 >= self.cursor {
                self.ahead.insert(group);
            }
        }
        self.skip_ahead();
    }
}

#[cfg(test)]
mod tests;
