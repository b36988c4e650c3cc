//! Recording the experts of a mixture of experts, for a learner that replays them.
//!
//! A sample has the experts of the passes by which its tokens were drawn: those of its prompt as it stood in the cache when the first
//! token was drawn, and those of each later token when it was fed in for the first time. So weights that are replaced while a sample
//! runs, and keys and values that are computed again after a preemption, change nothing of what is recorded.

use std::sync::Arc;

use pacs_model::RouteLog;

use super::Engine;
use crate::schedule::{Chunk, Plan, Source};

impl Engine {
    /// What a pass is recorded in; none where no row wants that, as with dense models.
    pub(super) fn route_log(&self, plan: &Plan) -> Option<RouteLog> {
        let shape = self.routes?;
        let mut rows = plan.decode.iter().copied().chain(plan.chunks.iter().map(|chunk| chunk.row));
        let is_wanted = rows.any(|row| self.scheduler.running()[row].sample.records_routes);
        is_wanted.then(|| RouteLog::new(shape))
    }

    /// Gives the experts of a pass to the rows and prompts whose tokens they computed.
    pub(super) fn keep_routes(&mut self, plan: &Plan, log: &RouteLog) {
        for (place, &row) in plan.decode.iter().enumerate() {
            let row = self.scheduler.sample_mut(row);
            if row.records_routes {
                log.append(place..place + 1, &mut row.routes);
            }
        }
        let token_bytes = self.routes.map_or(0, |shape| shape.token_bytes());
        let mut end = plan.decode.len();
        for &Chunk { row, source, start, tokens } in &plan.chunks {
            let of_chunk = end..end + tokens;
            end = of_chunk.end;
            if source == Source::Prompt && self.scheduler.running()[row].sample.records_routes {
                let routes = Arc::make_mut(&mut self.scheduler.prompt_mut(row).kept.routes);
                // A prompt that was in the making when new weights came begins anew.
                routes.truncate(start * token_bytes);
                log.append(of_chunk, routes);
            }
        }
    }

    /// Gives a row that is about to draw its first token the experts of its prompt.
    pub(super) fn take_prompt_routes(&mut self, row: usize) {
        if self.scheduler.running()[row].sample.tokens.is_empty() {
            let routes = Arc::clone(&self.scheduler.prompt(row).kept.routes);
            self.scheduler.sample_mut(row).prompt_routes = routes;
        }
    }
}
