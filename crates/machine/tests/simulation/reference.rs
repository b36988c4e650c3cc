//! An independent account of what was promised to others.

use std::collections::{BTreeMap, BTreeSet};

use pacs_machine::{
    Command, Counter, Counters, Dropped, Effect, End, EvaluationPlan, Event, GroupGrant, Machine, Options, PhaseKind,
    Refusal, Reply, Snapshot, Staleness, StopMode, TaskResult, UniformGroups, evaluation_problem,
};
use pacs_order::{DrawOrder, Evidence, History};
use pacs_types::{Generation, GroupId, LeaseId, Outcome, Role, SampleId, WorkerId};

use crate::leases::Leases;

/// Version of a sample's oldest token, and the newest version when the sample was submitted.
type Versions = (u64, u64);

#[derive(Debug, Default)]
pub(crate) struct Reference {
    /// Acknowledged samples, with their versions.
    generated: BTreeMap<SampleId, Versions>,
    leases: Leases,
    judged: BTreeSet<SampleId>,
    /// Newest label of every sample that was ever judged.
    labels: BTreeMap<SampleId, f64>,
    /// Uniform groups that were refilled or left out, with the step that was to come.
    uniform: BTreeMap<GroupId, u64>,
    /// Number of samples given up at each position.
    replaced: BTreeMap<SampleId, u32>,
    /// The attempt that each lease asks for.
    wanted: BTreeMap<(LeaseId, SampleId), u32>,
    /// Trained groups, with their step.
    used: BTreeMap<GroupId, u64>,
    dropped: BTreeSet<GroupId>,
    set_aside: BTreeSet<GroupId>,
    /// The step in training, with its samples and their versions.
    batch: Option<(u64, Vec<(SampleId, Versions)>)>,
    /// The dropped and used groups when a checkpoint was begun, by its step.
    dropped_at: BTreeMap<u64, (BTreeSet<GroupId>, BTreeMap<GroupId, u64>)>,
    /// The newest generation.
    pub(crate) generation: Generation,
    /// Number of ranks in it.
    ranks: usize,
    /// Number of generations formed.
    formed: u32,
    pub(crate) version: Option<u64>,
    /// Number of steps done.
    pub(crate) made: u64,
    /// The newest answered event; the effects that follow are its consequences.
    newest_event: Option<Event>,
    /// Ranks that have reported each task as done.
    reports: BTreeMap<u64, BTreeSet<WorkerId>>,
    /// The newest task that a rank has reported as trained.
    trained: u64,
    /// Number of ranks that take part in a save, by its task.
    savers: BTreeMap<u64, usize>,
    /// Groups that were refilled since the last step.
    refills: u32,
    /// Whether a batch has failed, so that the next ones may be trials.
    may_be_tried: bool,
    stop: Option<StopMode>,
    learning_rate: Option<f64>,
    counters: Counters,
    pub(crate) evaluated: BTreeSet<u64>,
    /// Steps whose evaluation a stop has abandoned, because the next step was in training.
    abandoned: BTreeSet<u64>,
    pub(crate) ended: Option<End>,
    pub(crate) counts: BTreeMap<String, u64>,
    /// Actor and process number of each registration.
    processes: BTreeMap<WorkerId, (usize, u64)>,
    /// The newest registration.
    newest: Option<WorkerId>,
}

impl Reference {
    pub(crate) fn count(&mut self, name: &str) {
        *self.counts.entry(name.to_owned()).or_default() += 1;
    }

    /// Records which process a registration belongs to.
    pub(crate) fn registered(&mut self, id: WorkerId, process: (usize, u64)) {
        self.processes.insert(id, process);
        self.newest = Some(id);
    }

    /// Checks that a name is not taken from a live process: only silence frees it.
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

    /// Checks an answer that a caller may see.
    pub(crate) fn answer(&mut self, event: &Event, answer: &Result<Reply, Refusal>, options: &Options) {
        self.newest_event = Some(event.clone());
        match event {
            Event::LeasesLapsed { groups, samples } => self.leases.lapsed(groups, samples),
            Event::Stalled => self.leases.stalled(),
            Event::GroupOverdue { group } => self.leases.reissued(*group),
            Event::Ending { worker } => self.leases.leaves(*worker),
            Event::Reopened => {
                self.leases.all_lapsed();
                self.leases.paused = false;
                self.stop = None;
            }
            Event::Operator { command, .. } if answer.is_ok() => self.operated(command),
            _ => {}
        }
        match answer {
            Ok(Reply::Registered(id)) => {
                let Event::Register { role, name, .. } = event else { panic!("{event:?} registers nobody") };
                self.leases.registered(*id, *role, name);
            }
            Ok(Reply::Groups(groups)) => {
                let Event::LeaseGroups { worker, request, .. } = event else { panic!("{event:?} leases no groups") };
                self.leases.groups(*worker, *request, groups);
                self.lent(groups);
            }
            Ok(Reply::Samples(samples)) => {
                let Event::LeaseSamples { worker, request, .. } = event else { panic!("{event:?} leases no samples") };
                self.leases.samples(*worker, *request, samples, options.max_attempts);
            }
            Ok(Reply::Accepted { fresh: true }) => self.accepted(event, options),
            Ok(Reply::Accepted { fresh: false }) => match event {
                // An ended run counts no failures.
                Event::SubmitVerdict { lease, sample, outcome: Outcome::Failed, .. } if self.ended.is_none() => {
                    self.leases.verification_failed(*lease, *sample);
                }
                Event::CompleteTask { generation, .. } => {
                    assert_eq!(*generation, self.generation, "a report of {generation} was not refused");
                }
                _ => {}
            },
            Err(Refusal::WrongVersion { .. }) => {
                let Event::SubmitSample { lease, .. } = event else { panic!("{event:?} is of no version") };
                self.leases.lapsed(&[*lease], &[]);
            }
            Ok(Reply::Joined(Some(membership))) => {
                // The answer precedes the effect of the same event.
                assert!(membership.generation >= self.generation, "a place in a generation that is over");
            }
            Err(Refusal::StaleGeneration { .. }) => self.count("stale_generations_refused"),
            _ => {}
        }
    }

    fn operated(&mut self, command: &Command) {
        match command {
            Command::Pause => self.leases.paused = true,
            Command::Resume => self.leases.paused = false,
            Command::Drain { worker } => self.leases.drained(worker),
            Command::Stop(mode) => {
                let is_hurried = *mode == StopMode::Now;
                if is_hurried || self.stop.is_none() {
                    self.stop = Some(*mode);
                }
            }
            Command::SetLearningRate(rate) => self.learning_rate = Some(*rate),
            Command::Checkpoint | Command::SetSlots(_) | Command::SetLogLevel(_) => {}
        }
    }

    fn lent(&mut self, groups: &[GroupGrant]) {
        for grant in groups {
            assert!(!grant.samples.is_empty(), "{} was leased with nothing to do", grant.group);
            assert!(!self.set_aside.contains(&grant.group), "{} was quarantined and leased", grant.group);
            assert!(!self.used.contains_key(&grant.group), "{} was trained on and leased", grant.group);
            for wanted in &grant.samples {
                let sample = SampleId { group: grant.group, index: wanted.index };
                assert!(!self.generated.contains_key(&sample), "{sample} was acknowledged and is asked for again");
                self.wanted.insert((grant.lease, sample), wanted.attempt);
            }
        }
    }

    fn accepted(&mut self, event: &Event, options: &Options) {
        match event {
            Event::SubmitSample { worker, lease, sample, version } => {
                self.leases.generated(*worker, *lease, *sample);
                let (attempt, replaced) = (self.wanted[&(*lease, *sample)], &self.replaced);
                assert_eq!(attempt, replaced.get(sample).copied().unwrap_or(0), "{sample} was given up before");
                let versions = (version.0, self.made);
                assert!(self.generated.insert(*sample, versions).is_none(), "{sample} was accepted twice");
            }
            Event::SubmitVerdict { worker, lease, sample, outcome, label, .. } => {
                self.leases.judged(*worker, *lease, *sample);
                self.labels.insert(*sample, *label);
                assert!(outcome.is_conclusive(), "a failed verification was taken as a verdict");
                assert!(self.generated.contains_key(sample), "{sample} was judged before it was generated");
                assert!(self.judged.insert(*sample), "{sample} was judged twice");
            }
            Event::CompleteTask { worker, generation, task, result } => {
                self.leases.heard(*worker);
                assert_eq!(*generation, self.generation, "a report of {generation} was heard");
                match result {
                    TaskResult::Trained { .. } => {
                        self.trained = *task;
                        self.reports.entry(*task).or_default().insert(*worker);
                    }
                    TaskResult::Saved => drop(self.reports.entry(*task).or_default().insert(*worker)),
                    TaskResult::Failed { .. } => self.may_be_tried = true,
                    TaskResult::Prepared { .. } | TaskResult::Captured => {}
                }
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
                let reports = self.reports.remove(&self.trained).map_or(0, |ranks| ranks.len());
                assert_eq!(reports, self.ranks, "step {step} counts by the reports of {reports} ranks");
                let is_owed = self.owes_evaluation(self.made, options) && !self.abandoned.contains(&self.made);
                assert!(!is_owed, "step {step} counts, and the evaluation before it is not complete");
                if !matches!(self.newest_event, Some(Event::CompleteTask { .. })) {
                    self.count("steps_held_for_an_evaluation");
                }
                (self.made, self.refills) = (*step, 0);
                assert_eq!(self.version.replace(*step), Some(step - 1), "versions go up by one");
            }
            Effect::Evaluated { step, groups, excluded, .. } => {
                // Simulated jobs with several sets evaluate all of them at once.
                assert_eq!(
                    groups.len() + *excluded as usize,
                    measured(options).map(|plan| plan.problems as usize).sum::<usize>()
                );
                for group in groups {
                    let is_of_set = |first| evaluation_problem(*group).is_some_and(|number| number >= first);
                    let set = options.evaluation_sets.iter().find(|set| is_of_set(set.first));
                    let plan = set.map_or(options.evaluation, |set| set.plan);
                    let versions = self.take_complete(*group, plan.samples_per_problem);
                    assert!(versions.iter().all(|(version, _)| version == step), "{group} measures other weights");
                    self.forget(*group);
                }
                assert!(self.evaluated.insert(*step), "step {step} was measured twice");
                assert!(!self.abandoned.contains(step), "the evaluation of step {step} was abandoned");
            }
            Effect::ReplaceSample(sample) => {
                // While an undone batch waits for a checkpoint, its samples are still listed with the batch.
                let of_batch = self.batch.as_mut().is_some_and(|(_, batch)| {
                    let before = batch.len();
                    batch.retain(|(held, _)| held != sample);
                    batch.len() < before
                });
                assert!(of_batch || self.generated.remove(sample).is_some(), "{sample} was never generated");
                self.judged.remove(sample);
                self.leases.replaced(*sample);
                *self.replaced.entry(*sample).or_default() += 1;
            }
            Effect::DropGroup { group, why } => {
                self.forget(*group);
                if *why == Dropped::Uniform {
                    self.uniform.insert(*group, self.made + 1);
                    self.refills += 1;
                    assert!(self.refills <= options.max_refills, "{group} is one refill too many");
                }
                if *why == Dropped::Deadly {
                    let (deaths, most) = (self.leases.deaths(*group), options.max_worker_losses);
                    assert!(deaths >= most, "{group} was quarantined for {deaths} deaths");
                }
                match (evaluation_problem(*group), why) {
                    (_, Dropped::Deadly | Dropped::Poisonous) => drop(self.set_aside.insert(*group)),
                    (Some(_), _) => {}
                    (None, _) => drop(self.dropped.insert(*group)),
                }
            }
            Effect::RestartGroup(group) => {
                // Groups that rested during trials may be restarted, too.
                let rested = self.formed > 2;
                assert!(options.staleness == Staleness::Evict || rested, "{group} starts again for nothing");
                self.leases.forget(*group);
                // Attempts continue: given-up samples of the group stay given up.
                self.generated.retain(|sample, _| sample.group != *group);
                self.judged.retain(|sample| sample.group != *group);
            }
            Effect::ForgetEvaluation(_) if options.evaluation_only => panic!("what was measured is forgotten"),
            Effect::ForgetEvaluation(groups) => {
                groups.iter().for_each(|group| self.forget(*group));
                let stops = matches!(&self.newest_event, Some(Event::Operator { command: Command::Stop(_), .. }));
                if stops && self.batch.is_some() {
                    self.count("evaluations_abandoned");
                    self.abandoned.insert(self.made);
                }
            }
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
            Effect::CreateCheckpoint { step, save } => {
                self.savers.insert(*save, self.ranks);
                self.dropped_at.insert(*step, (self.dropped.clone(), self.uniform.clone()));
            }
            Effect::CommitCheckpoint { snapshot, save, .. } => {
                let written = self.reports.get(save).map_or(0, BTreeSet::len);
                assert_eq!(Some(&written), self.savers.get(save), "a checkpoint that {written} ranks have written");
                if self.version > Some(snapshot.step) {
                    self.count("committed_behind_the_newest_step");
                }
            }
            Effect::Prepared { step } => self.version = Some(*step),
            Effect::Rewound { step, forgotten } => {
                assert_eq!(*step, committed.map_or(0, |(snapshot, _)| snapshot.step));
                self.check_cause();
                if *step < self.made {
                    self.leases.undone();
                } else if self.generated.keys().any(|sample| evaluation_problem(sample.group).is_some()) {
                    self.count("evaluations_that_outlive_a_generation");
                }
                self.rewind(*step);
                forgotten.iter().for_each(|group| self.forget(*group));
                let undone = self.generated.iter().find(|(_, (_, newest))| newest > step);
                assert_eq!(undone, None, "a sample of weights that were undone is still there");
            }
            Effect::Narrowed(_) => self.count("searches"),
            Effect::WorkerLost { worker, why, .. } => match why.as_str() {
                "left" => self.leases.left(*worker),
                _ => self.leases.lost(*worker),
            },
            Effect::Ended(end) => {
                assert_eq!(self.ended.replace(end.clone()), None, "a run ends once");
                if *end == End::Stopped && self.stop != Some(StopMode::Now) {
                    let saved = committed.map_or(0, |(snapshot, _)| snapshot.step);
                    assert_eq!(self.made, saved, "a stop that was to save what is made ended the run without");
                }
            }
            _ => {}
        }
    }

    /// Checks that steps are undone for a reason: a rank was lost or failed, or its training data is gone. A restart of
    /// the coordinator is no reason.
    fn check_cause(&self) {
        let is_learner = |worker: &WorkerId| self.leases.role(*worker) == Some(Role::Learner);
        let is_cause = match &self.newest_event {
            Some(Event::Leave { worker, .. } | Event::WorkerSilent { worker }) => is_learner(worker),
            Some(Event::Register { role, .. }) => *role == Role::Learner,
            Some(Event::CompleteTask { result, .. }) => {
                matches!(result, TaskResult::Failed { .. }) || self.may_be_tried
            }
            Some(
                Event::TaskOverdue { .. }
                | Event::CheckpointCommitted { .. }
                | Event::CheckpointFailed { .. }
                | Event::CheckpointOverdue { .. }
                | Event::SampleGone { .. }
                | Event::Stalled
                | Event::Reopened,
            ) => true,
            _ => false,
        };
        assert!(is_cause, "{:?} undid steps", self.newest_event);
    }

    /// Checks at the end that every due evaluation was done.
    pub(crate) fn evaluations(&self, options: &Options) {
        let is_due = |step: &u64| measured(options).any(|plan| plan.is_due(*step, options.total_steps));
        let due: BTreeSet<u64> = (0..=options.total_steps).filter(is_due).collect();
        let done: BTreeSet<u64> = self.evaluated.union(&self.abandoned).copied().collect();
        assert_eq!(due, done, "the steps that were measured are not those that are due");
        assert!(options.max_lag > 0 || self.abandoned.is_empty(), "an evaluation was abandoned without lag");
    }

    fn owes_evaluation(&self, step: u64, options: &Options) -> bool {
        let is_due = measured(options).any(|plan| plan.is_due(step, options.total_steps));
        is_due && !self.evaluated.contains(&step)
    }

    /// Checks at the end that every step was made of the groups whose turn it was, in a run that has given up none, draws
    /// without a curriculum and has taken all its checkpoints.
    pub(crate) fn batches(&mut self, options: &Options, counters: &Counters) {
        let gave_up = [Counter::DroppedGroups, Counter::SetAsideGroups, Counter::FailedCheckpoints]
            .into_iter()
            .any(|counter| counters.get(&counter).is_some_and(|count| *count > 0));
        let draws_in_order = options.curriculum.is_none() && options.uniform_groups != UniformGroups::Refill;
        if options.max_lag > 0 || gave_up || !draws_in_order {
            return;
        }
        let of_a_step = u64::from(options.prompts_per_step);
        let expected = (0..options.total_steps * of_a_step).map(|group| (GroupId(group), group / of_a_step + 1));
        assert_eq!(self.used, expected.collect(), "faults have changed which groups are in which batch");
        if self.counts.contains_key("searches") {
            self.count("searches_without_a_trace");
        }
    }

    fn trained(&mut self, step: u64, groups: &[GroupId], left_out: &[GroupId], lag: u64, options: &Options) {
        assert_eq!(groups.len() + left_out.len(), options.prompts_per_step as usize);
        assert!(groups.len() >= options.min_batch_groups as usize);
        assert!(groups.is_sorted() && groups.iter().all(|group| evaluation_problem(*group).is_none()));
        assert!(left_out.is_empty() || options.uniform_groups == UniformGroups::Drop);
        assert_eq!(Some(step - 1), self.version, "a step is made of the newest weights");
        if self.owes_evaluation(step - 1, options) && !self.abandoned.contains(&(step - 1)) {
            assert!(options.max_lag > 0, "step {step} is trained before the evaluation of its weights");
            self.count("steps_trained_during_an_evaluation");
        }
        let (mut oldest, mut batch) = (step - 1, Vec::new());
        for group in groups.iter().chain(left_out) {
            let versions = self.take_complete(*group, options.samples_per_prompt);
            oldest = versions.iter().map(|(version, _)| *version).fold(oldest, u64::min);
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

    /// Removes a complete group; returns the versions of its samples.
    fn take_complete(&mut self, group: GroupId, samples: u32) -> Vec<Versions> {
        let sample = |index| SampleId { group, index };
        (0..samples)
            .map(|index| {
                assert!(self.judged.remove(&sample(index)), "{} has no verdict", sample(index));
                self.generated.remove(&sample(index)).unwrap_or_else(|| panic!("{} is not there", sample(index)))
            })
            .collect()
    }

    fn forget(&mut self, group: GroupId) {
        self.leases.forget(group);
        self.generated.retain(|sample, _| sample.group != group);
        self.judged.retain(|sample| sample.group != group);
        self.replaced.retain(|sample, _| sample.group != group);
    }

    /// Undoes all steps after `step`; the groups of the step in training are available again.
    fn rewind(&mut self, step: u64) {
        (self.version, self.made, self.refills) = (None, step, 0);
        self.evaluated.retain(|evaluated| *evaluated <= step);
        self.abandoned.retain(|abandoned| *abandoned < step);
        let mut making = None;
        if let Some((made, batch)) = self.batch.take() {
            making = Some(made);
            self.may_be_tried = true;
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

    /// Checks that every drawn prompt is in exactly one place. Called when everything is synced.
    pub(crate) fn conservation(&mut self, machine: &Machine) {
        let position = machine.position();
        assert_eq!(position.learning_rate, self.learning_rate, "the learning rate is not what the operator has set");
        let count = |counter| position.counters.get(counter).copied().unwrap_or(0);
        let less = self.counters.iter().find(|(counter, before)| count(counter) < **before);
        assert_eq!(less, None, "a counter went back");
        self.counters.clone_from(&position.counters);
        let mut places: Vec<GroupId> = self.places(position).collect();
        if let Some((step, _)) = &self.batch {
            // This group is counted as in flight.
            places.retain(|group| self.used.get(group) != Some(step));
        }
        places.extend(machine.groups_in_flight());
        places.sort_unstable();
        let drawn = (0..position.cursor).map(GroupId).chain(position.ahead.iter().copied());
        let skipped = self.skipped(machine);
        let expected: Vec<GroupId> = drawn.filter(|group| !skipped.contains(group)).collect();
        assert_eq!(places, expected, "used, in flight, dropped, quarantined and requeued are not what was drawn");
        // An operator may have reduced the slots since they were filled.
        let options = machine.options();
        // During trials, the groups of one batch may rest in addition.
        let most = (options.max_lag + 2) * options.prompts_per_step;
        assert!(machine.in_flight() <= most as usize, "more groups in flight than the bound allows");
        self.busy_learners(machine);
    }

    /// Checks that the learners are not idle for an evaluation that may run concurrently, nor with a complete batch.
    fn busy_learners(&self, machine: &Machine) {
        let options = machine.options();
        match machine.phase() {
            PhaseKind::Evaluating
                if options.max_lag > 0 && !options.evaluation_only && self.made < options.total_steps =>
            {
                let reports = self.reports.get(&self.trained).map_or(0, BTreeSet::len);
                let is_ahead = self.batch.is_some() && reports == self.ranks;
                assert!(is_ahead, "the learners wait for an evaluation and are not a step ahead");
            }
            // A trial may leave complete groups out of the batch.
            PhaseKind::Sampling if !machine.is_paused() && !self.may_be_tried => {
                let groups = machine.groups_in_flight();
                let is_judged = |group, index| self.judged.contains(&SampleId { group, index });
                let is_complete =
                    |group: &GroupId| (0..options.samples_per_prompt).all(|index| is_judged(*group, index));
                let idle = groups.len() >= options.prompts_per_step as usize && groups.iter().all(is_complete);
                assert!(!idle, "all groups are complete, and no step is in training");
            }
            _ => {}
        }
    }

    /// Draws that were skipped. Checks that the machine's history matches the labels that it was shown: only problems
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

    /// Forgets what was not checkpointed: the journal is lost, and the job resumes from a checkpoint.
    pub(crate) fn start_over(&mut self, snapshot: &Snapshot) {
        self.rewind(snapshot.step);
        self.generated.clear();
        self.judged.clear();
        self.replaced.clear();
        self.set_aside = snapshot.set_aside.keys().copied().collect();
        self.leases.start_over();
        (self.learning_rate, self.counters) = (snapshot.learning_rate, snapshot.counters.clone());
        (self.ended, self.stop) = (None, None);
    }
}

fn most_samples(options: &Options) -> usize {
    // During trials, the groups of one batch may rest in addition to those in flight.
    let training = (options.max_lag + 2) * options.prompts_per_step * options.samples_per_prompt;
    let evaluation: u32 = measured(options).map(|plan| plan.problems * plan.samples_per_problem).sum();
    (training + evaluation) as usize
}

/// The schedules of all evaluation sets.
fn measured(options: &Options) -> impl Iterator<Item = &EvaluationPlan> {
    std::iter::once(&options.evaluation).chain(options.evaluation_sets.iter().map(|set| &set.plan))
}
