//! One optimizer update as one rank sees it.

use std::ops::Range;

use super::batch::TrainBatch;
use super::metrics::StepMetrics;
use super::objective::StepObjective;

/// One optimizer update on one rank.
#[derive(Debug)]
pub(super) struct Update<'a> {
    pub(super) batch: &'a TrainBatch,
    pub(super) objective: &'a StepObjective<'a>,
    /// Positions of the mini-batch's sequences.
    pub(super) members: Range<usize>,
    /// This rank's sequences of the mini-batch, by place.
    pub(super) mine: Vec<usize>,
    /// Whether no update has been made since the weights that the step started with.
    pub(super) fresh: bool,
    /// Whether the coefficients are known before the forward, so that one pass suffices.
    pub(super) known: bool,
}

impl Update<'_> {
    /// Selects this rank's sequences that may have a gradient, and reports the metrics of the others.
    pub(super) fn live(&self, metrics: &mut StepMetrics) -> Vec<usize> {
        let (inert, live): (Vec<usize>, Vec<usize>) =
            self.mine.iter().partition(|place| self.objective.is_inert(**place));
        inert.iter().for_each(|place| self.objective.skip(*place, metrics));
        live
    }
}
