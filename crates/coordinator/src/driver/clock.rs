use std::collections::BTreeMap;
use std::time::Instant;

use pacs_machine::PhaseKind;

/// Wall-clock time spent in each phase.
#[derive(Debug)]
pub(crate) struct PhaseClock {
    phase: PhaseKind,
    since: Instant,
    seconds: BTreeMap<PhaseKind, f64>,
    last_sample: Option<Instant>,
    /// End of the newest sampling phase.
    sampled: Option<Instant>,
}

impl PhaseClock {
    pub(crate) fn new(now: Instant) -> Self {
        Self { phase: PhaseKind::Assembling, since: now, seconds: BTreeMap::new(), last_sample: None, sampled: None }
    }

    pub(crate) fn enter(&mut self, phase: PhaseKind, now: Instant) {
        self.settle(now);
        if self.phase == PhaseKind::Sampling {
            self.sampled = Some(now);
        }
        self.phase = phase;
        if phase == PhaseKind::Sampling {
            self.last_sample = None;
        }
    }

    pub(crate) fn sample_arrived(&mut self, now: Instant) {
        self.last_sample = Some(now);
    }

    /// Seconds spent in a phase since they were last taken.
    pub(crate) fn take(&mut self, phase: PhaseKind, now: Instant) -> f64 {
        self.settle(now);
        self.seconds.remove(&phase).unwrap_or(0.0)
    }

    /// Seconds from the last sample to the end of the newest sampling phase, in which only verifiers worked.
    pub(crate) fn verifying_tail(&self) -> f64 {
        match (self.last_sample, self.sampled) {
            (Some(sample), Some(end)) => end.saturating_duration_since(sample).as_secs_f64(),
            _ => 0.0,
        }
    }

    /// Forgets the time spent so far; the current phase continues.
    pub(crate) fn clear(&mut self) {
        self.seconds.clear();
    }

    fn settle(&mut self, now: Instant) {
        *self.seconds.entry(self.phase).or_default() += now.saturating_duration_since(self.since).as_secs_f64();
        self.since = now;
    }
}

/// Duration of checkpoints, from the start of the save until they are durable.
#[derive(Debug, Default)]
pub(crate) struct SaveClock {
    began: Option<Instant>,
    /// Duration of the newest checkpoint since it was last taken.
    took: Option<f64>,
}

impl SaveClock {
    pub(crate) fn begin(&mut self, now: Instant) {
        self.began = Some(now);
    }

    /// Notes that the checkpoint is durable; returns its duration, 0 if an earlier process began it.
    pub(crate) fn end(&mut self, now: Instant) -> f64 {
        let took = self.began.take().map(|began| now.saturating_duration_since(began).as_secs_f64());
        self.took = took.or(self.took);
        took.unwrap_or(0.0)
    }

    /// Duration of the newest checkpoint, if one ended since this was last taken.
    pub(crate) fn take(&mut self) -> Option<f64> {
        self.took.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_checkpoint_is_timed_from_its_beginning_to_its_end() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut clock = SaveClock::default();
        assert_eq!((clock.end(at(1)), clock.take()), (0.0, None), "an earlier process began it");
        clock.begin(at(2));
        assert_eq!(clock.take(), None, "it is on its way");
        assert_eq!(clock.end(at(5)), 3.0);
        assert_eq!((clock.take(), clock.take()), (Some(3.0), None));
    }

    #[test]
    fn time_goes_to_the_phase_that_it_was_spent_in() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut clock = PhaseClock::new(start);
        clock.enter(PhaseKind::Sampling, at(1));
        clock.sample_arrived(at(4));
        clock.enter(PhaseKind::Training, at(6));
        assert_eq!(clock.take(PhaseKind::Training, at(9)), 3.0);
        assert_eq!(clock.take(PhaseKind::Training, at(10)), 1.0);
        assert_eq!(clock.take(PhaseKind::Sampling, at(10)), 5.0);
        assert_eq!(clock.take(PhaseKind::Evaluating, at(10)), 0.0);
        assert_eq!(clock.verifying_tail(), 2.0);
    }
}
