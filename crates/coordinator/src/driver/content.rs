//! Handles samples whose content cannot be read.

use pacs_machine::Event;
use pacs_types::SampleId;

use super::{ContentError, Shared};
use crate::progress::RunEnd;

impl Shared {
    /// Regenerates a sample whose content is lost. If the disk refuses the read, ends the run of this process instead:
    /// the content may be intact, and only a restarted coordinator can tell.
    pub(crate) fn content_lost(&self, sample: SampleId, error: &ContentError) {
        let Ok(mut driver) = self.lock() else { return };
        if error.is_damage() {
            tracing::error!(%sample, "the journal has lost a sample; it is generated again: {error}");
            // Absent if another rank or verifier has reported the same damage already.
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
