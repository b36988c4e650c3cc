use pacs_order::{DrawOrder, DrawPlan};

use crate::LoadReport;

/// A question with its reference answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The question as the source has it, without suffix.
    pub question: String,
    /// The reference answer.
    pub answer: String,
    /// Token ids of the whole prompt, up to where the model's answer begins.
    pub prompt_tokens: Vec<u32>,
}

/// All problems of a job.
#[derive(Debug)]
pub struct Problems {
    /// Those that are trained on, set by set in the order of the spec, each in the order of its source; never empty.
    pub train: Vec<Problem>,
    /// The held-out ones, in the order of their source; empty when the job does not evaluate.
    pub evaluation: Vec<Problem>,
    /// What was read and what was left out.
    pub report: LoadReport,
    pub(crate) order: DrawOrder,
}

impl Problems {
    /// The training problem at `cursor`, the number of prompts that were drawn before.
    ///
    /// The answer depends on the cursor, the seed, the problems and the weights of their sets alone, so a job goes on where
    /// it was by remembering the cursor (see [`DrawOrder`]).
    #[must_use]
    pub fn train_at(&self, cursor: u64) -> &Problem {
        &self.train[self.order.index_at(cursor)]
    }

    /// What the order of draws depends on.
    #[must_use]
    pub fn plan(&self) -> &DrawPlan {
        self.order.plan()
    }
}
