//! What becomes of the run when the content of a sample cannot be had any more.

use pacs_machine::Event;
use pacs_types::SampleId;

use super::{ContentError, Shared};
use crate::progress::RunEnd;

impl Shared {
    /// Has a sample generated again whose content is lost, or ends the run where the disk does not give it: then what is on
    /// the disk may be whole, and only a coordinator that starts again can tell.
    pub(crate) fn content_lost(&self, sample: SampleId, error: &ContentError) {
        let Ok(mut driver) = self.lock() else { return };
        if error.is_damage() {
            tracing::error!(%sample, "the journal has lost a sample; it is generated again: {error}");
            // A repeat: another rank or verifier has met the same damage.
            if driver.store.has(sample, false) {
                driver.tell(Event::SampleGone { sample });
            }
        } else if driver.end.borrow().is_none() {
            let reason = format!("the journal cannot be read: {sample}: {error}");
            tracing::error!("{reason}");
            driver.end.send_replace(Some(RunEnd::Interrupted { reason }));
        }
    }
}
