//! What was promised to others, told independently of the machine.

use std::collections::{BTreeMap, BTreeSet};

use pacs_machine::{
    Dropped, Effect, End, EvaluationPlan, Event, GroupGrant, Machine, Options, Refusal, Reply, Snapshot, Staleness,
    UniformGroups, evaluation_problem,
};
use pacs_order::{DrawOrder, Evidence, History};
use pacs_types::{Generation, GroupId, LeaseId, SampleId, WorkerId};

#[derive(Debug, Default)]
pub(crate) struct Reference {
    /// Samples that were acknowledged, with the version of their oldest token.
    generated: BTreeMap<SampleId, u64>,
    judged: BTreeSet<SampleId>,
    /// Labels of all samples that were ever judged; the newest counts.
    labels: BTreeMap<SampleId, f64>,
    /// Groups that left because their labels are all the same, with the step that was to come.
    uniform: BTreeMap<GroupId, u64>,
    /// Samples that were given up, by place.
    replaced: BTreeMap<SampleId, u32>,
    /// What each loan asks for.
    wanted: BTreeMap<(LeaseId, SampleId), u32>,
    /// Training groups by the step that they were trained in.
    used: BTreeMap<GroupId, u64>,
    dropped: BTreeSet<GroupId>,
    set_aside: BTreeSet<GroupId>,
    /// The step in the making, with its samples and their versions.
    batch: Option<(u64, Vec<(SampleId, u64)>)>,
    /// What was dropped when a checkpoint was begun, by its step.
    dropped_at: BTreeMap<u64, (BTreeSet<GroupId>, BTreeMap<GroupId, u64>)>,
    /// The newest generation; none while it is dissolved.
    pub(crate) generation: Generation,
    /// Its ranks.
    ranks: usize,
    /// Generations that were formed.
    formed: u32,
    pub(crate) version: Option<u64>,
    /// Steps that are made.
    made: u64,
    pub(crate) evaluated: BTreeSet<u64>,
    pub(crate) ended: Option<End>,
    pub(crate) counts: BTreeMap<String, u64>,
    /// The processes behind registrations: which actor's, and the how manyeth.
    processes: BTreeMap<WorkerId, (usize, u64)>,
    /// The newest registration.
    newest: Option<WorkerId>,
}

impl Reference {
    pub(crate) fn count(&mut self, name: &str) {
        *self.counts.entry(name.to_owned()).or_default() += 1;
    }

    /// Notes whose a registration is.
    pub(crate) fn registered(&mut self, id: WorkerId, process: (usize, u64)) {
        self.processes.insert(id, process);
        self.newest = Some(id);
    }

    /// Checks that no name is taken from a process that lives: only silence frees it.
    pub(crate) fn lost(&mut self, id: WorkerId, why: &str, exists: impl Fn((usize, u64)) -> bool) {
        if why != "was replaced by a new process" {
            return;
        }
        let (old, new) = (self.processes[&id], self.processes[&self.newest.expect("another one has registered")]);
        if old == new {
            return self.count("registered_twice");
        }
        assert!(!exists(old), "{id} lives, and its name was given to another process");
        self.count("names_taken_over");
    }

    /// Checks an answer that somebody may see.
    pub(crate) fn answer(&mut self, event: &Event, answer: &Result<Reply, Refusal>, options: &Options) {
        match answer {
            Ok(Reply::Groups(groups)) => self.lent(groups),
            Ok(Reply::Accepted { fresh: true }) => self.accepted(event, options),
            Ok(Reply::Joined(Some(membership))) => {
                // The answer comes before the effect of the same event.
                assert!(membership.generation >= self.generation, "a place in a generation that is over");
            }
            Err(Refusal::StaleGeneration { .. }) => self.count("stale_generations_refused"),
            _ => {}
        }
    }

    fn lent(&mut self, groups: &[GroupGrant]) {
        for grant in groups {
            assert!(!grant.samples.is_empty(), "{} was lent with nothing to do", grant.group);
            assert!(!self.set_aside.contains(&grant.group), "{} was set aside and lent", grant.group);
            assert!(!self.used.contains_key(&grant.group), "{} was trained on and lent", grant.group);
            for wanted in &grant.samples {
                let sample = SampleId { group: grant.group, index: wanted.index };
                assert!(!self.generated.contains_key(&sample), "{sample} was acknowledged and is asked for again");
                self.wanted.insert((grant.lease, sample), wanted.attempt);
            }
        }
    }

    fn accepted(&mut self, event: &Event, options: &Options) {
        match event {
            Event::SubmitSample { lease, sample, version, .. } => {
                let (attempt, replaced) = (self.wanted[&(*lease, *sample)], &self.replaced);
                assert_eq!(attempt, replaced.get(sample).copied().unwrap_or(0), "{sample} was given up before");
                assert!(self.generated.insert(*sample, version.0).is_none(), "{sample} was accepted twice");
            }
            Event::SubmitVerdict { sample, outcome, label, .. } => {
                self.labels.insert(*sample, *label);
                assert!(outcome.is_conclusive(), "a failed verification was taken as a verdict");
                assert!(self.generated.contains_key(sample), "{sample} was judged before it was generated");
                assert!(self.judged.insert(*sample), "{sample} was judged twice");
            }
            Event::CompleteTask { generation, .. } => {
                assert_eq!(*generation, self.generation, "a report of {generation} was heard");
            }
            other => panic!("{other:?} was accepted"),
        }
        assert!(self.generated.len() <= most_samples(options), "memory is not bounded");
    }

    /// Checks an effect that is carried out.
    pub(crate) fn effect(&mut self, effect: &Effect, options: &Options, committed: Option<&(Snapshot, bool)>) {
        match effect {
            Effect::Train { step, groups, left_out, ranks, lag } => {
                assert_eq!(*ranks as usize, self.ranks);
                self.trained(*step, groups, left_out, *lag, options);
            }
            Effect::StepDone { step } => {
                let (made, _) = self.batch.take().expect("a step was in the making");
                assert_eq!(made, *step);
                self.made = *step;
                assert_eq!(self.version.replace(*step), Some(step - 1), "versions go up by one");
            }
            Effect::Evaluated { step, groups, excluded } => {
                // The simulated jobs with several sets measure all of them at once.
                assert_eq!(
                    groups.len() + *excluded as usize,
                    measured(options).map(|plan| plan.problems as usize).sum::<usize>()
                );
                for group in groups {
                    let is_of_set = |first| evaluation_problem(*group).is_some_and(|number| number >= first);
                    let set = options.evaluation_sets.iter().find(|set| is_of_set(set.first));
                    let plan = set.map_or(options.evaluation, |set| set.plan);
                    let versions = self.take_complete(*group, plan.samples_per_problem);
                    assert!(versions.iter().all(|version| version == step), "{group} measures other weights");
                    self.forget(*group);
                }
                assert!(self.evaluated.insert(*step), "step {step} was measured twice");
            }
            Effect::ReplaceSample(sample) => {
                // That of a batch that is undone, but for the checkpoint that this waits for, is still with the batch.
                let of_batch = self.batch.as_mut().is_some_and(|(_, batch)| {
                    let before = batch.len();
                    batch.retain(|(held, _)| held != sample);
                    batch.len() < before
                });
                assert!(of_batch || self.generated.remove(sample).is_some(), "{sample} was never generated");
                self.judged.remove(sample);
                *self.replaced.entry(*sample).or_default() += 1;
            }
            Effect::DropGroup { group, why } => {
                self.forget(*group);
                if *why == Dropped::Uniform {
                    self.uniform.insert(*group, self.made + 1);
                }
                match (evaluation_problem(*group), why) {
                    (_, Dropped::Deadly | Dropped::Poisonous) => drop(self.set_aside.insert(*group)),
                    (Some(_), _) => {}
                    (None, _) => drop(self.dropped.insert(*group)),
                }
            }
            Effect::RestartGroup(group) => {
                // Also when groups have rested while it was found out which of them training fails by.
                let rested = self.formed > 2;
                assert!(options.staleness == Staleness::Evict || rested, "{group} starts again for nothing");
                // The noise goes on where it was: places that were replaced stay so.
                self.generated.retain(|sample, _| sample.group != *group);
                self.judged.retain(|sample| sample.group != *group);
            }
            Effect::ForgetEvaluation(_) if options.evaluation_only => panic!("what was measured is forgotten"),
            Effect::ForgetEvaluation(groups) => groups.iter().for_each(|group| self.forget(*group)),
            Effect::GenerationFormed { generation, names } => {
                assert!(*generation > self.generation, "generations go up");
                self.formed += 1;
                assert!((options.min_learners as usize..=options.learners as usize).contains(&names.len()));
                if self.ranks > 0 && names.len() != self.ranks {
                    self.count(if names.len() < self.ranks {
                        "generations_with_fewer"
                    } else {
                        "generations_with_more"
                    });
                }
                (self.generation, self.ranks) = (*generation, names.len());
            }
            Effect::CreateCheckpoint { step, .. } => {
                self.dropped_at.insert(*step, (self.dropped.clone(), self.uniform.clone()));
            }
            Effect::CommitCheckpoint { snapshot, .. } if self.version > Some(snapshot.step) => {
                self.count("committed_behind_the_newest_step");
            }
            Effect::Prepared { step } => self.version = Some(*step),
            Effect::Rewound { step, forgotten } => {
                assert_eq!(*step, committed.map_or(0, |(snapshot, _)| snapshot.step));
                self.rewind(*step);
                forgotten.iter().for_each(|group| self.forget(*group));
            }
            Effect::Ended(end) => assert_eq!(self.ended.replace(end.clone()), None, "a run ends once"),
            _ => {}
        }
    }

    fn trained(&mut self, step: u64, groups: &[GroupId], left_out: &[GroupId], lag: u64, options: &Options) {
        assert_eq!(groups.len() + left_out.len(), options.prompts_per_step as usize);
        assert!(groups.len() >= options.min_batch_groups as usize);
        assert!(groups.is_sorted() && groups.iter().all(|group| evaluation_problem(*group).is_none()));
        assert!(left_out.is_empty() || options.uniform_groups == UniformGroups::Drop);
        assert_eq!(Some(step - 1), self.version, "a step is made of the newest weights");
        let (mut oldest, mut batch) = (step - 1, Vec::new());
        for group in groups.iter().chain(left_out) {
            let versions = self.take_complete(*group, options.samples_per_prompt);
            oldest = versions.iter().copied().fold(oldest, u64::min);
            let sample = |index| SampleId { group: *group, index };
            batch.extend((0u32..).map(sample).zip(versions));
            assert_eq!(self.used.insert(*group, step), None, "{group} is trained on twice");
        }
        assert_eq!(lag, step - 1 - oldest, "the lag is that of the oldest token");
        if options.staleness != Staleness::Accept {
            assert!(lag <= u64::from(options.max_lag), "step {step} trains on tokens of v{oldest}");
        }
        if lag > 0 && lag == u64::from(options.max_lag) {
            self.count("trained_at_full_lag");
        }
        self.batch = Some((step, batch));
    }

    /// A complete group leaves; the versions of its samples.
    fn take_complete(&mut self, group: GroupId, samples: u32) -> Vec<u64> {
        let sample = |index| SampleId { group, index };
        (0..samples)
            .map(|index| {
                assert!(self.judged.remove(&sample(index)), "{} has no verdict", sample(index));
                self.generated.remove(&sample(index)).unwrap_or_else(|| panic!("{} is not there", sample(index)))
            })
            .collect()
    }

    fn forget(&mut self, group: GroupId) {
        self.generated.retain(|sample, _| sample.group != group);
        self.judged.retain(|sample| sample.group != group);
        self.replaced.retain(|sample, _| sample.group != group);
    }

    /// Undoes all steps behind `step`; what the step in the making had taken is there again.
    fn rewind(&mut self, step: u64) {
        (self.version, self.made) = (None, step);
        self.evaluated.retain(|evaluated| *evaluated <= step);
        let mut making = None;
        if let Some((made, batch)) = self.batch.take() {
            making = Some(made);
            for (sample, version) in batch {
                self.generated.insert(sample, version);
                self.judged.insert(sample);
            }
        }
        let undone: Vec<GroupId> =
            self.used.iter().filter(|(_, used)| **used > step && Some(**used) != making).map(|(id, _)| *id).collect();
        undone.into_iter().for_each(|group| self.forget(group));
        self.used.retain(|_, used| *used <= step);
        let (dropped, uniform) = self.dropped_at.get(&step).cloned().unwrap_or_default();
        self.dropped.retain(|group| dropped.contains(group));
        self.uniform = uniform;
        self.dropped_at.retain(|at, _| *at <= step);
    }

    /// No prompt is lost, and none is in two places. Checked when everything is synced.
    pub(crate) fn conservation(&self, machine: &Machine) {
        let position = machine.position();
        let mut places: Vec<GroupId> = self.places(position).collect();
        if let Some((step, _)) = &self.batch {
            // Counted as in flight.
            places.retain(|group| self.used.get(group) != Some(step));
        }
        places.extend(machine.groups_in_flight());
        places.sort_unstable();
        let drawn = (0..position.cursor).map(GroupId).chain(position.ahead.iter().copied());
        let skipped = self.skipped(machine);
        let expected: Vec<GroupId> = drawn.filter(|group| !skipped.contains(group)).collect();
        assert_eq!(places, expected, "used, in flight, dropped, set aside and requeued are not what was drawn");
        // An operator may have taken slots away since they were filled.
        let options = machine.options();
        // And the groups of one batch may rest while it is found out which of them training fails by.
        let most = (options.max_lag + 2) * options.prompts_per_step;
        assert!(machine.in_flight() <= most as usize, "more groups in flight than the bound allows");
    }

    /// Draws that no group came of. Checks that the machine remembers of its problems what was shown to it: only problems
    /// that were trained on are ever skipped.
    fn skipped(&self, machine: &Machine) -> BTreeSet<GroupId> {
        let (position, options) = (machine.position(), machine.options());
        let Some(curriculum) = &options.curriculum else {
            assert!(position.history.is_empty(), "nobody asked for a history");
            return BTreeSet::new();
        };
        let order = DrawOrder::new(curriculum.plan.clone());
        let problem = |group: GroupId| order.index_at(group.0);
        let mut groups: Vec<(u64, GroupId)> = self.used.iter().map(|(group, step)| (*step, *group)).collect();
        groups.extend(self.uniform.iter().map(|(group, step)| (*step, *group)));
        groups.sort_unstable();
        let mut history = History::default();
        for of_step in groups.chunk_by(|a, b| a.0 == b.0).take_while(|groups| groups[0].0 <= position.step) {
            for (_, group) in of_step {
                let labels = (0..options.samples_per_prompt).map(|index| SampleId { group: *group, index });
                history.note(*group, Evidence::of(labels.map(|sample| self.labels[&sample])));
            }
            history.settle(problem);
        }
        let seen = |history: &History, problem| history.of(problem).map(|seen| (seen.visits, seen.rate));
        for problem in 0..curriculum.plan.problems() {
            assert_eq!(seen(&position.history, problem), seen(&history, problem), "the history of problem {problem}");
        }
        let places: BTreeSet<GroupId> = machine.groups_in_flight().into_iter().chain(self.places(position)).collect();
        let over = (0..position.cursor).map(GroupId).filter(|group| !position.ahead.contains(group));
        let skipped: BTreeSet<GroupId> = over.filter(|group| !places.contains(group)).collect();
        for group in &skipped {
            assert!(history.of(problem(*group)).is_some(), "{group} is lost: its problem was never trained on");
        }
        skipped
    }

    /// Training groups that are not in flight.
    fn places<'a>(&'a self, position: &'a Snapshot) -> impl Iterator<Item = GroupId> + 'a {
        let set_aside = self.set_aside.iter().filter(|group| evaluation_problem(**group).is_none());
        self.used.keys().chain(&self.dropped).chain(set_aside).chain(&position.requeued).copied()
    }

    /// What was there is not there any more: the journal was lost, and the job goes on from a checkpoint.
    pub(crate) fn start_over(&mut self, snapshot: &Snapshot) {
        self.rewind(snapshot.step);
        self.generated.clear();
        self.judged.clear();
        self.replaced.clear();
        self.set_aside = snapshot.set_aside.keys().copied().collect();
        self.ended = None;
    }
}

fn most_samples(options: &Options) -> usize {
    // The groups of one batch may rest beside those in flight.
    let training = (options.max_lag + 2) * options.prompts_per_step * options.samples_per_prompt;
    let evaluation: u32 = measured(options).map(|plan| plan.problems * plan.samples_per_problem).sum();
    (training + evaluation) as usize
}

/// All sets of problems.
fn measured(options: &Options) -> impl Iterator<Item = &EvaluationPlan> {
    std::iter::once(&options.evaluation).chain(options.evaluation_sets.iter().map(|set| &set.plan))
}
