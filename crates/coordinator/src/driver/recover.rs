//! Resumes where an earlier coordinator of this folder stopped: machine and payloads are rebuilt from the journal by
//! the code that built them first.

use std::time::Instant;

use pacs_machine::{End, Event, Record, Reply, Step};
use pacs_protocol::v1;
use pacs_types::{Sample, Verdict};
use prost::Message;

use super::{Driver, KeptSample, purpose_of};
use crate::journal::{FrameKey, Frames, Recovered};
use crate::records::Job;
use crate::services::keep_result;

/// Keys of the driver's extra state in a snapshot.
const WEIGHTS: &str = "weights";
const PUBLISHED: &str = "published";
const TRAINED: &str = "trained";
const SIGNALS: &str = "signals";
const SAVED: &str = "saved/";

impl Driver {
    /// Queues a snapshot that will replace the journal's records once everything before it is on disk. The machine is
    /// copied here, which takes a fraction of the time that serializing it takes.
    pub(crate) fn keep_snapshot(&mut self) {
        // During replay the machine does not reflect all records yet.
        if self.replaying {
            return;
        }
        let mut extras = Vec::new();
        extras.extend(self.weights.as_ref().map(|weights| (WEIGHTS.to_owned(), weights.encode_to_vec())));
        extras.extend(self.published.as_ref().map(|weights| (PUBLISHED.to_owned(), weights.encode_to_vec())));
        extras.extend(self.trained.as_ref().map(|trained| (TRAINED.to_owned(), trained.encode_to_vec())));
        extras.extend(self.signals.report().map(|report| (SIGNALS.to_owned(), report.encode_to_vec())));
        for (rank, files) in &self.saved {
            let file = |file: &crate::records::RankFile| v1::SavedFile {
                path: file.path.clone(),
                bytes: file.bytes,
                crc32: file.crc32,
            };
            let result = v1::SaveResult { files: files.iter().map(file).collect() };
            extras.push((format!("{SAVED}{rank}"), result.encode_to_vec()));
        }
        let (seq, machine) = (self.journal.begin_snapshot(), Box::new(self.machine.clone()));
        self.hand_over(Job::Keep { seq, machine, extras });
    }

    /// Replays what the journal holds; the machine of its snapshot is this driver's already.
    pub(crate) fn recover(&mut self, recovered: Recovered) {
        let began = Instant::now();
        let Recovered { extras, records, frames, .. } = recovered;
        let counts = (records.len(), frames.len());
        for (name, value) in extras {
            if let Err(error) = self.take_extra(&name, &value) {
                tracing::error!("`{name}` of the journal cannot be read: {error}");
            }
        }
        self.learner_names = self.machine.learner_names();
        let present: Vec<_> = self.machine.present().collect();
        for present in present {
            self.load_sample(&frames, FrameKey::Sample(present.sample, present.lease));
            if let Some(lease) = present.verdict {
                self.load_verdict(&frames, FrameKey::Verdict(present.sample, lease));
            }
        }
        // The snapshot may have been taken while a batch was in training.
        if let Some((step, groups, left_out)) = self.machine.training() {
            // Forming a batch clears what ranks have reported, which the snapshot has restored.
            let (trained, signals) = (self.trained.take(), std::mem::take(&mut self.signals));
            let ranks = u32::try_from(self.learner_names.len()).unwrap_or(u32::MAX);
            self.form_batch(step, groups, left_out, ranks);
            (self.trained, self.signals) = (trained, signals);
        }
        self.replaying = true;
        for (record, payload) in records {
            self.replay(record, payload.as_deref(), &frames);
        }
        self.replaying = false;
        let now = self.machine.now();
        self.time_before = now;
        self.started = Instant::now();
        self.machine.resume(now);
        let step = self.machine.position().step;
        self.note(format!(
            "resumed at step {step} from the journal: {} records and {} samples and verdicts in {:.2} s",
            counts.0,
            counts.1,
            began.elapsed().as_secs_f64()
        ));
    }

    /// Completes what the earlier coordinator may have left undone. Called once the driver is shared.
    pub(crate) fn go_on(&mut self) {
        let gone: Vec<_> = self
            .machine
            .present()
            .filter(|present| !self.store.has(present.sample, present.verdict.is_some()))
            .collect();
        for present in gone {
            tracing::error!(sample = %present.sample, "the journal has lost a sample; it is generated again");
            self.tell(Event::SampleGone { sample: present.sample });
        }
        // Recorded, because members may have died while the coordinator was down.
        if !self.machine.is_alone() {
            self.tell(Event::Resumed);
        }
        // Whoever starts a stopped or failed run again wants it to continue.
        if self.machine.is_stopping() || self.machine.ended().is_some_and(|end| *end != End::Finished) {
            self.tell(Event::Reopened);
        }
        // Jobs of the run folder are not journaled, so those of a save are queued again. Both are idempotent.
        if let Some((step, save)) = self.machine.saving() {
            self.hand_over(Job::Create { step, save, bytes: self.save_bytes });
        }
        if let Some((snapshot, model, save)) = self.machine.committing() {
            let snapshot = snapshot.clone();
            self.commit_checkpoint(snapshot, model, save);
        }
    }

    fn take_extra(&mut self, name: &str, value: &[u8]) -> Result<(), prost::DecodeError> {
        match name {
            WEIGHTS => self.weights = Some(v1::WeightsRef::decode(value)?),
            PUBLISHED => self.published = Some(v1::WeightsRef::decode(value)?),
            TRAINED => self.trained = Some(v1::TrainResult::decode(value)?),
            SIGNALS => self.signals.put(v1::TrainResult::decode(value)?.signals),
            _ => {
                if let Some(rank) = name.strip_prefix(SAVED).and_then(|rank| rank.parse().ok()) {
                    let saved = v1::complete_task_request::Result::Saved(v1::SaveResult::decode(value)?);
                    keep_result(self, rank, saved);
                }
            }
        }
        Ok(())
    }

    /// Replays one record.
    fn replay(&mut self, record: Record, payload: Option<&[u8]>, frames: &Frames) {
        let rank = match &record.event {
            Event::CompleteTask { worker, .. } => self.machine.rank(*worker),
            _ => None,
        };
        let Step { answer, effects, .. } = self.machine.step(record.now, record.event.clone());
        let is_fresh = answer == Ok(Reply::Accepted { fresh: true });
        match &record.event {
            Event::SubmitSample { lease, sample, .. } if is_fresh => {
                self.load_sample(frames, FrameKey::Sample(*sample, *lease));
            }
            Event::SubmitVerdict { lease, sample, .. } if is_fresh => {
                self.load_verdict(frames, FrameKey::Verdict(*sample, *lease));
            }
            Event::CompleteTask { .. } if is_fresh => {
                let request = payload.map(v1::CompleteTaskRequest::decode);
                if let (Some(rank), Some(Ok(v1::CompleteTaskRequest { result: Some(result), .. }))) = (rank, request) {
                    keep_result(self, rank, result);
                }
            }
            _ => {}
        }
        for effect in effects {
            self.apply_one(effect);
        }
    }

    fn load_sample(&mut self, frames: &Frames, key: FrameKey) {
        let FrameKey::Sample(id, _) = key else { return };
        let Some(frame) = frames.stored(key) else { return };
        // A sample that an earlier version accepted, but this one would refuse, is generated again.
        let check = |sample: &Sample| {
            self.door.sample(sample, purpose_of(id.group))?;
            self.check_route_count(id.group, sample.routes.len(), sample.tokens.len())
        };
        match KeptSample::load(frame, check) {
            Ok(sample) => self.store.put_sample(id, sample),
            Err(error) => tracing::error!(sample = %id, "a sample of the journal cannot be read: {error}"),
        }
    }

    fn load_verdict(&mut self, frames: &Frames, key: FrameKey) {
        let FrameKey::Verdict(id, _) = key else { return };
        let read = frames.get(key).and_then(|body| v1::Verdict::decode(body.as_slice()).ok());
        let Some(wire) = read else { return };
        match Verdict::try_from(wire).and_then(|verdict| self.door.verdict(&verdict).map(|()| verdict)) {
            Ok(verdict) => self.store.put_verdict(id, verdict),
            Err(error) => tracing::error!(sample = %id, "a verdict of the journal is invalid: {error}"),
        }
    }
}
