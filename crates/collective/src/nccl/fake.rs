//! Fake CUDA and NCCL for tests: device memory in this process, and a communicator with scripted behaviour.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::api::{Api, Comm, DeviceError, Event, Launch, Pointer, Stream, UniqueId, Versions};

/// Scripted behaviour, and a record of the calls.
#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) versions: Versions,
    /// Polls before the communicator settles.
    pub(crate) settles_after: usize,
    /// Operations from this one on, counted from 0, never end.
    pub(crate) hangs_at: Option<usize>,
    /// Operations from this one on, counted from 0, make NCCL report an error.
    pub(crate) breaks_at: Option<usize>,
    /// How long an abort takes; the state of the communicator stays as it is until then.
    pub(crate) abort_takes: Duration,
    pub(super) state: Mutex<FakeState>,
    pub(super) live: AtomicUsize,
}

#[derive(Debug, Default)]
pub(super) struct FakeState {
    log: Vec<String>,
    memory: HashMap<u64, Vec<u8>>,
    next: usize,
    looks: usize,
    launches: usize,
    finalized: bool,
    aborted: bool,
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self {
            versions: Versions { nccl: 22809, cuda: 13000 },
            settles_after: 3,
            hangs_at: None,
            breaks_at: None,
            abort_takes: Duration::ZERO,
            state: Mutex::default(),
            live: AtomicUsize::new(0),
        }
    }

    /// Calls on the communicator and the streams, in order.
    pub(crate) fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    /// Number of streams, events, buffers and communicators that were not freed.
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    pub(crate) fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }

    fn note(&self, what: impl Into<String>) {
        self.state.lock().unwrap().log.push(what.into());
    }

    fn make(&self) -> usize {
        self.live.fetch_add(1, Ordering::SeqCst);
        let mut state = self.state.lock().unwrap();
        state.next += 1;
        state.next
    }

    fn give_back(&self) {
        self.live.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Api for Fake {
    fn versions(&self) -> Result<Versions, DeviceError> {
        Ok(self.versions)
    }

    fn index(&self) -> Option<usize> {
        None
    }

    fn create_stream(&self) -> Result<Stream, DeviceError> {
        Ok(Stream(self.make()))
    }

    fn destroy_stream(&self, _: Stream) {
        self.give_back();
    }

    fn create_event(&self) -> Result<Event, DeviceError> {
        Ok(Event(self.make()))
    }

    fn destroy_event(&self, _: Event) {
        self.give_back();
    }

    fn record(&self, _: Event, stream: Stream) -> Result<(), DeviceError> {
        self.note(if stream.0 == 0 || stream.0 > 1000 { "record theirs" } else { "record ours" });
        Ok(())
    }

    fn wait_for(&self, _: Stream, _: Event) -> Result<(), DeviceError> {
        self.note("wait for theirs");
        Ok(())
    }

    fn is_reached(&self, _: Event) -> Result<bool, DeviceError> {
        let state = self.state.lock().unwrap();
        let hangs = self.hangs_at.is_some_and(|at| state.launches > at);
        Ok(!hangs || state.aborted)
    }

    fn allocate(&self, bytes: usize) -> Result<Pointer, DeviceError> {
        let pointer = 4096 * self.make() as u64;
        self.state.lock().unwrap().memory.insert(pointer, vec![0; bytes]);
        Ok(Pointer(pointer))
    }

    fn free(&self, memory: Pointer) {
        self.state.lock().unwrap().memory.remove(&memory.0);
        self.give_back();
    }

    fn upload(&self, from: &[u8], to: Pointer) -> Result<(), DeviceError> {
        let mut state = self.state.lock().unwrap();
        state.memory.get_mut(&to.0).unwrap()[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), DeviceError> {
        to.copy_from_slice(&self.state.lock().unwrap().memory[&from.0][..to.len()]);
        Ok(())
    }

    fn copy(&self, _: Pointer, _: Pointer, _: usize, _: Stream) -> Result<(), DeviceError> {
        Ok(())
    }

    fn unique_id(&self) -> Result<UniqueId, DeviceError> {
        Ok(std::array::from_fn(|i| i as u8 + 1))
    }

    fn begin(&self, id: &UniqueId, world_size: usize, rank: usize) -> Result<Comm, DeviceError> {
        self.note(format!("begin {rank} of {world_size} with {:?}", &id[..3]));
        Ok(Comm(self.make()))
    }

    fn is_settled(&self, _: Comm) -> Result<bool, DeviceError> {
        let mut state = self.state.lock().unwrap();
        if self.breaks_at.is_some_and(|at| state.launches > at) {
            return Err(DeviceError::Call { call: "NCCL", message: "remote process exited (code 6)".into() });
        }
        state.looks += 1;
        Ok(state.looks > self.settles_after)
    }

    fn enqueue(&self, _: Comm, launch: Launch, _: Stream) -> Result<(), DeviceError> {
        let mut state = self.state.lock().unwrap();
        state.looks = 0;
        state.launches += 1;
        state.log.push(format!("{launch:?}"));
        Ok(())
    }

    fn finalize(&self, _: Comm) -> Result<(), DeviceError> {
        let mut state = self.state.lock().unwrap();
        assert!(!state.aborted, "an aborted communicator is gone");
        state.finalized = true;
        state.log.push("finalize".into());
        Ok(())
    }

    fn destroy(&self, _: Comm) {
        assert!(self.state.lock().unwrap().finalized, "an orderly end begins with `finalize`");
        self.note("destroy");
        self.give_back();
    }

    fn abort(&self, _: Comm) {
        std::thread::sleep(self.abort_takes);
        self.state.lock().unwrap().aborted = true;
        self.note("abort");
        self.give_back();
    }

    fn leave(&self, why: &str) {
        self.note(format!("leave: {why}"));
    }
}
