use crate::Reply;
use crate::machine::Machine;
use crate::phase::Phase;

impl Machine {
    /// Saves and ends at the next safe point. Sampling is one: its groups are drawn again by the resumed run.
    pub(crate) fn request_stop(&mut self) {
        self.reply(Reply::Done);
        if self.is_ended() || self.stop_requested {
            return;
        }
        self.stop_requested = true;
        match self.phase {
            Phase::Sampling(_) => {
                self.abandon_round();
                self.advance();
            }
            Phase::Assembling | Phase::Preparing(_) => self.advance(),
            Phase::Training(_) | Phase::Saving(_) | Phase::Committing { .. } | Phase::Ended(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Effect, End, Event, Options};

    #[test]
    fn a_stop_during_sampling_saves_the_last_step() {
        let mut run = Run::sampling(Options { total_steps: 5, ..options() });
        run.full_step();
        run.generate_all();
        run.step(Event::StopRequested);
        let effects = run.save();
        let Some(Effect::CommitCheckpoint { snapshot, model: false }) = effects.last() else { panic!("{effects:?}") };
        assert_eq!((snapshot.step, snapshot.cursor), (1, 2), "the abandoned groups will be drawn again");
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
    }

    #[test]
    fn a_stop_with_nothing_to_save_is_immediate() {
        for mut run in [Run::new(options()), Run::preparing(options()), Run::sampling(options())] {
            let effects = run.step(Event::StopRequested);
            assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        }
    }
}
