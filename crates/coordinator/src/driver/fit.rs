//! Bounds the size of answers: leases that do not fit into a message return to the queue.

use pacs_machine::{Event, GroupGrant, SampleGrant};
use pacs_protocol::ANSWER_BYTES;
use pacs_types::{GroupId, LeaseId};

use super::Driver;

/// Allowance for the fixed part of a group or sample lease, including sampling options and weights.
const LEASE_BYTES: usize = 1024;
/// Upper bound on an encoded list element.
const NUMBER_BYTES: usize = 5;
/// Upper bound on an encoded wanted sample.
const WANTED_BYTES: usize = 14;

impl Driver {
    /// Samples that a rollout worker may ask for, chosen so that an answer rarely has to be cut.
    pub(crate) fn most_free_samples(&self) -> u32 {
        let longest = |report: &pacs_data::SourceReport| report.longest_prompt_tokens;
        let report = &self.problems.report;
        let measured = report.sets.iter().map(|(_, report)| longest(report)).max();
        let longest = measured.unwrap_or(0).max(longest(&report.train));
        let samples = self.problems.sets.iter().map(|measured| measured.set.samples).max();
        let group = self.spec.rollout.samples_per_prompt.max(samples.unwrap_or(0));
        let bytes = LEASE_BYTES + NUMBER_BYTES * longest + WANTED_BYTES * group as usize;
        let groups = u32::try_from(ANSWER_BYTES / bytes).unwrap_or(u32::MAX);
        groups.max(1).saturating_mul(group)
    }

    /// Samples that a verifier may ask for, likewise.
    pub(crate) fn most_samples_to_judge(&self) -> u32 {
        u32::try_from(ANSWER_BYTES / (LEASE_BYTES + self.store.largest_text())).unwrap_or(u32::MAX).max(1)
    }

    /// The grants whose prompts fit into one answer; the others are returned to the queue.
    pub(crate) fn fit_groups(&mut self, mut grants: Vec<GroupGrant>) -> Vec<GroupGrant> {
        let bytes = |group: GroupId, samples: usize| {
            LEASE_BYTES + NUMBER_BYTES * self.problem(group).prompt_tokens.len() + WANTED_BYTES * samples
        };
        let fitting = how_many_fit(grants.iter().map(|grant| bytes(grant.group, grant.samples.len())));
        let groups = grants.split_off(fitting).into_iter().map(|grant| grant.lease).collect();
        self.lease_again(groups, Vec::new());
        grants
    }

    /// The grants whose questions and answers fit into one message; the others are returned to the queue.
    pub(crate) fn fit_samples(&mut self, mut grants: Vec<SampleGrant>) -> Vec<SampleGrant> {
        let fitting = how_many_fit(grants.iter().map(|grant| {
            let problem = self.problem(grant.sample.group);
            let text = self.store.sample(grant.sample).map_or(0, |sample| sample.text_bytes as usize);
            LEASE_BYTES + problem.question.len() + problem.answer.len() + text
        }));
        let samples = grants.split_off(fitting).into_iter().map(|grant| grant.lease).collect();
        self.lease_again(Vec::new(), samples);
        grants
    }

    fn lease_again(&mut self, groups: Vec<LeaseId>, samples: Vec<LeaseId>) {
        if !(groups.is_empty() && samples.is_empty()) {
            self.tell(Event::LeasesLapsed { groups, samples });
        }
    }
}

/// Number of items of these sizes that fit into an answer; the first always does.
fn how_many_fit(sizes: impl Iterator<Item = usize>) -> usize {
    let mut room = ANSWER_BYTES;
    sizes
        .take_while(|bytes| {
            let fits = *bytes <= room || room == ANSWER_BYTES;
            room = room.saturating_sub(*bytes);
            fits
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_what_fits_and_at_least_one() {
        let fit = |sizes: &[usize]| how_many_fit(sizes.iter().copied());
        assert_eq!(fit(&[]), 0);
        assert_eq!(fit(&[ANSWER_BYTES + 1, 1]), 1);
        assert_eq!(fit(&[ANSWER_BYTES / 2, ANSWER_BYTES / 2, 1]), 2);
        assert_eq!(fit(&[1, ANSWER_BYTES, 1]), 1);
        assert_eq!(fit(&[1000; 3]), 3);
    }
}
