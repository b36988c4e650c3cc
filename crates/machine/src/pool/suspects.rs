//! What kills its workers: groups that do so to rollout workers, answers that do so to verifiers.
//!
//! A worker holds many things when it dies, and most of them are innocent. So each death is held against all of them, but
//! what is one death short of the budget is a suspect: it is lent alone, to a worker that holds nothing else, and only the
//! death of that one counts as proof. What is innocent clears itself by being done.

use pacs_types::{GroupId, SampleId, WorkerId};

use super::Pool;

/// What a worker held when it went.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Revoked {
    /// Loans that ended.
    pub(crate) loans: usize,
    /// Groups that have killed too many rollout workers.
    pub(crate) deadly: Vec<GroupId>,
    /// Samples that have killed too many verifiers; they wait for another one.
    pub(crate) deadly_samples: Vec<SampleId>,
}

impl Pool {
    /// The next group for a worker: its place in the queue, its missing samples, and whether it is lent alone.
    pub(crate) fn next_for(&self, worker: WorkerId) -> Option<(usize, usize, bool)> {
        let holds = self.held.contains_key(&worker);
        let mut of_worker = self.group_loans.values().filter(|loan| loan.worker == worker);
        if holds && !self.suspects.is_empty() && of_worker.any(|loan| self.suspects.contains(&loan.item)) {
            return None;
        }
        let fits = |id: &GroupId| !holds || !self.suspects.contains(id);
        let place = self.waiting.iter().position(fits)?;
        let id = self.waiting[place];
        Some((place, self.groups[&id].missing(), self.suspects.contains(&id)))
    }

    /// Whether a worker has a sample on loan.
    pub(crate) fn holds_sample(&self, worker: WorkerId) -> bool {
        self.held_samples.contains_key(&worker)
    }

    /// Whether a worker has a sample on loan that is to be alone with it.
    pub(crate) fn holds_suspect_sample(&self, worker: WorkerId) -> bool {
        let is_suspect = |item: &SampleId| self.suspect_samples.contains(item);
        !self.suspect_samples.is_empty()
            && self.holds_sample(worker)
            && self.sample_loans.values().any(|loan| loan.worker == worker && is_suspect(&loan.item))
    }

    pub(crate) fn is_suspect_sample(&self, id: SampleId) -> bool {
        self.suspect_samples.contains(&id)
    }

    /// Ends every loan of a worker; the work waits again, first in line. One that `died` is held against what it held.
    pub(crate) fn revoke_worker(&mut self, worker: WorkerId, died: bool, most_losses: u32) -> Revoked {
        let (groups, samples) = self.loans_matching(|loan| loan.worker == worker, |loan| loan.worker == worker);
        let mut revoked = Revoked { loans: groups.len() + samples.len(), ..Revoked::default() };
        let held: Vec<GroupId> = groups.iter().map(|lease| self.group_loans[lease].item).collect();
        let held_samples: Vec<SampleId> = samples.iter().map(|lease| self.sample_loans[lease].item).collect();
        self.end_loans(&groups, &samples);
        if died {
            revoked.deadly = held.into_iter().filter(|id| self.hold_against(*id, most_losses)).collect();
            let is_deadly = |id: &SampleId| self.hold_sample_against(*id, most_losses);
            revoked.deadly_samples = held_samples.into_iter().filter(is_deadly).collect();
        }
        revoked
    }

    /// Notes that a worker died while it held a group. Returns whether the group has killed too many.
    fn hold_against(&mut self, id: GroupId, most: u32) -> bool {
        let Some(group) = self.groups.get_mut(&id) else { return false };
        match count_loss(&mut group.losses, self.suspects.contains(&id), most) {
            Loss::Deadly => true,
            Loss::Suspect => {
                self.suspects.insert(id);
                false
            }
            Loss::Noted => false,
        }
    }

    /// The same of a verifier and a sample.
    fn hold_sample_against(&mut self, id: SampleId, most: u32) -> bool {
        let was_alone = self.suspect_samples.contains(&id);
        match count_loss(&mut self.slot_mut(id).losses, was_alone, most) {
            Loss::Deadly => true,
            Loss::Suspect => {
                self.suspect_samples.insert(id);
                false
            }
            Loss::Noted => false,
        }
    }
}

/// What a worker's death says of something that it held.
enum Loss {
    Noted,
    Suspect,
    Deadly,
}

fn count_loss(losses: &mut u32, was_alone: bool, most: u32) -> Loss {
    *losses += 1;
    if most <= 1 || was_alone {
        return Loss::Deadly;
    }
    // Not beyond what makes it a suspect: with others beside it, it need not have been the one.
    *losses = (*losses).min(most - 1);
    if *losses + 1 >= most { Loss::Suspect } else { Loss::Noted }
}
