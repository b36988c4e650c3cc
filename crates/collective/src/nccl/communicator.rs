use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::api::{Api, Comm, DeviceError, Event, Launch, Stream, UNIQUE_ID_BYTES, Versions};
use super::device::{CudaDevice, DeviceBuffer};
use crate::error::Fault;
use crate::{
    AbortHandle, Collective, CollectiveError, DEVICE_BANDWIDTH_FLOOR, ErrorKind, GroupConfig, HostCollective,
    HostListener, Limits, Operation,
};

/// How long an operation is polled without a pause, since many end within this time.
const SPIN: Duration = Duration::from_micros(200);
/// Shortest and longest pause between later polls; it doubles each time.
const PAUSE: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));
/// How long a result may still arrive after a neighbour closed its connection: it may have finished first and left.
const GRACE: Duration = Duration::from_secs(1);
/// Longest orderly shutdown; then the communicator is aborted.
const FINALIZE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an abort may take; then the process ends.
const ABORT_TIMEOUT: Duration = Duration::from_secs(30);

/// The NCCL communicator of one rank in one generation, with a TCP ring alongside. Dropping it ends the communicator on
/// the other ranks.
///
/// NCCL runs in non-blocking mode on a stream of its own. The thread that calls an operation polls its completion on
/// the device, NCCL's errors, the neighbours' sockets, the deadline and the abort handle. An abort from another thread
/// is therefore a flag that the polling thread sees within a millisecond, and `ncclCommAbort` never races with another
/// call on the same communicator. It runs on a thread of its own, and the process ends with exit code 75 when it has not come back after
/// 30 seconds. Between operations, no work of NCCL runs on the device.
#[derive(Debug)]
pub struct NcclCollective {
    ring: HostCollective,
    device: CudaDevice,
    /// `None` after an abort.
    comm: Option<Comm>,
    stream: Option<Stream>,
    done: Option<Event>,
    versions: Versions,
    /// How long an abort may take.
    patience: Duration,
}

impl NcclCollective {
    /// Joins a generation: connects the ring, compares versions, and forms the communicator. Returns when
    /// every rank has.
    ///
    /// # Errors
    ///
    /// As [`HostCollective::connect_abortable`], when versions of NCCL or CUDA differ between ranks, and
    /// when NCCL fails.
    pub fn connect(
        listener: &HostListener,
        group: GroupConfig,
        abort: AbortHandle,
        device: &CudaDevice,
    ) -> Result<Self, CollectiveError> {
        let ring = HostCollective::connect_abortable(listener, group, abort)?;
        Self::form(ring, device)
    }

    /// Creates a communicator of a single rank, which needs no network.
    ///
    /// # Errors
    ///
    /// When NCCL fails.
    pub fn alone(device: &CudaDevice) -> Result<Self, CollectiveError> {
        Self::form(HostCollective::alone(), device)
    }

    /// Returns the versions of NCCL and CUDA, the same on every rank.
    #[must_use]
    pub fn versions(&self) -> Versions {
        self.versions
    }

    /// With another patience for aborts.
    #[cfg(test)]
    pub(crate) fn with_patience(self, patience: Duration) -> Self {
        let mut patient = self;
        patient.patience = patience;
        patient
    }

    pub(crate) fn form(mut ring: HostCollective, device: &CudaDevice) -> Result<Self, CollectiveError> {
        let fail = |ring: &HostCollective, error| ring.fail(Operation::Connect, own(error));
        let api = device.api();
        let versions = api.versions().map_err(|error| fail(&ring, error))?;
        compare(&mut ring, versions)?;
        let mut id = [0; UNIQUE_ID_BYTES];
        if ring.rank() == 0 {
            id = api.unique_id().map_err(|error| fail(&ring, error))?;
        }
        ring.broadcast(0, &mut id)?;
        let world_size = ring.world_size();
        let rank = ring.rank();
        // From here on, an error path drops `formed`, which frees what exists.
        let mut formed = Self {
            ring,
            device: device.clone(),
            comm: None,
            stream: None,
            done: None,
            versions,
            patience: ABORT_TIMEOUT,
        };
        let connect = |formed: &mut Self| -> Result<(), Fault> {
            let api = formed.device.api();
            formed.stream = Some(api.create_stream().map_err(own)?);
            formed.done = Some(api.create_event().map_err(own)?);
            let comm = api.begin(&id, world_size, rank).map_err(own)?;
            formed.comm = Some(comm);
            let watch = Watch::new(&formed.ring, Operation::Connect, 0);
            watch.until("the ranks to form the communicator", || api.is_settled(comm))
        };
        if let Err(fault) = connect(&mut formed) {
            return Err(formed.end(Operation::Connect, fault));
        }
        // No rank continues before all have formed the communicator.
        formed.barrier()?;
        tracing::info!(rank, world_size, %versions, "joined the NCCL communicator");
        Ok(formed)
    }

    /// Runs one operation on the device, after the work that the buffer's event marks.
    fn on_device(&mut self, operation: Operation, data: &DeviceBuffer, launch: Launch) -> Result<(), CollectiveError> {
        self.try_on_device(operation, data, launch).map_err(|fault| self.end(operation, fault))
    }

    fn try_on_device(&self, operation: Operation, data: &DeviceBuffer, launch: Launch) -> Result<(), Fault> {
        let watch = Watch::new(&self.ring, operation, data.bytes);
        let (Some(comm), Some(stream), Some(done)) = (self.comm, self.stream, self.done) else {
            let first = "the communicator was aborted".to_owned();
            return Err(Fault::own(self.ring.reason().unwrap_or(ErrorKind::Ended { first })));
        };
        if let Some(kind) = self.ring.reason() {
            return Err(Fault::own(kind));
        }
        let api = self.device.api();
        api.wait_for(stream, data.ready).map_err(own)?;
        api.enqueue(comm, launch, stream).map_err(own)?;
        // Until NCCL has settled, the operation may not be in the stream, and the event would be recorded before it.
        watch.until("NCCL to take the operation", || api.is_settled(comm))?;
        api.record(done, stream).map_err(own)?;
        watch.until("the devices of the other ranks", || {
            // Settled since the wait above; polled again because it also reports NCCL's errors.
            Ok(api.is_settled(comm)? & api.is_reached(done)?)
        })
    }

    /// Ends the communicator with its first error. Afterwards no work of NCCL runs on the device, so that the owner may
    /// reuse the memory.
    fn end(&mut self, operation: Operation, fault: Fault) -> CollectiveError {
        let error = self.ring.fail(operation, fault);
        if let Some(comm) = self.comm.take() {
            tracing::warn!(rank = error.rank, %error, "aborting the NCCL communicator");
            let api = self.device.api();
            abort(api, comm, self.patience);
            if let (Some(done), Some(stream)) = (self.done, self.stream) {
                let deadline = Instant::now() + FINALIZE_TIMEOUT;
                let drained = api.record(done, stream).and_then(|()| pause_until(deadline, || api.is_reached(done)));
                if !matches!(drained, Ok(true)) {
                    tracing::error!(rank = error.rank, ?drained, "the device still works after the abort");
                }
            }
        }
        error
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> usize {
        self.ring.rank()
    }

    fn world_size(&self) -> usize {
        self.ring.world_size()
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring.all_reduce_sum(data)
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring.reduce_scatter_sum(data)
    }

    fn all_reduce_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError> {
        self.ring.all_reduce_sum_i64(data)
    }

    fn reduce_scatter_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError> {
        self.ring.reduce_scatter_sum_i64(data)
    }

    fn all_gather(&mut self, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.ring.all_gather(data)
    }

    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.ring.all_gather_f64(mine)
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.ring.broadcast(root, data)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.ring.barrier()
    }

    fn limits(&self) -> Limits {
        // Limits of the slower of the two networks.
        self.ring.limits()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.ring.abort_handle()
    }

    fn device(&self) -> Option<&CudaDevice> {
        Some(&self.device)
    }

    fn all_reduce_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        let numbers = self.numbers(Operation::AllReduceSum, data)?;
        self.on_device(Operation::AllReduceSum, data, Launch::AllReduceSum { data: data.pointer, numbers })
    }

    fn reduce_scatter_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        let numbers = self.numbers(Operation::ReduceScatterSum, data)?;
        self.ring.check_parts(Operation::ReduceScatterSum, numbers)?;
        let part = numbers / self.world_size();
        let rank = self.rank();
        let launch = Launch::ReduceScatterSum { data: data.pointer, part, rank };
        self.on_device(Operation::ReduceScatterSum, data, launch)
    }

    fn all_gather_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.ring.check_parts(Operation::AllGather, data.bytes)?;
        let part = data.bytes / self.world_size();
        let rank = self.rank();
        self.on_device(Operation::AllGather, data, Launch::AllGather { data: data.pointer, part, rank })
    }

    fn broadcast_device(&mut self, root: usize, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.ring.check_root(root)?;
        let launch = Launch::Broadcast { data: data.pointer, bytes: data.bytes, root };
        self.on_device(Operation::Broadcast, data, launch)
    }
}

impl NcclCollective {
    fn numbers(&self, operation: Operation, data: &DeviceBuffer) -> Result<usize, CollectiveError> {
        if data.bytes.is_multiple_of(size_of::<f32>()) {
            return Ok(data.bytes / size_of::<f32>());
        }
        let kind = ErrorKind::Invalid(format!("{} bytes are no whole float32 numbers", data.bytes));
        Err(self.ring.fail(operation, Fault::own(kind)))
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        let api = self.device.api();
        if let Some(comm) = self.comm.take() {
            // Data for other ranks may still be in flight although the operation has ended here, so only a failed
            // communicator is aborted.
            let deadline = Instant::now() + FINALIZE_TIMEOUT;
            let orderly = self.ring.reason().is_none()
                && api.finalize(comm).is_ok()
                && matches!(pause_until(deadline, || api.is_settled(comm)), Ok(true));
            if orderly { api.destroy(comm) } else { abort(api, comm, self.patience) }
        }
        if let Some(event) = self.done.take() {
            api.destroy_event(event);
        }
        if let Some(stream) = self.stream.take() {
            api.destroy_stream(stream);
        }
    }
}

/// Aborts a communicator on a thread of its own and waits for it; when NCCL does not come back the process is to end.
fn abort(api: &Arc<dyn Api>, comm: Comm, patience: Duration) {
    let (done, ended) = mpsc::channel();
    let own = Arc::clone(api);
    let aborting = move || {
        own.abort(comm);
        // The receiver is gone when it came too late.
        let _ = done.send(());
    };
    if thread::Builder::new().name("nccl-abort".to_owned()).spawn(aborting).is_err() {
        api.leave("no thread could be started that aborts the NCCL communicator");
        return;
    }
    match ended.recv_timeout(patience) {
        Ok(()) => {}
        Err(mpsc::RecvTimeoutError::Timeout) => {
            api.leave(&format!("ncclCommAbort did not come back within {patience:?}"));
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => api.leave("the thread that aborts the NCCL communicator panicked"),
    }
}

/// Fails if any rank has other library versions than this one.
fn compare(ring: &mut HostCollective, ours: Versions) -> Result<(), CollectiveError> {
    let all = ring.all_gather_f64(&[f64::from(ours.nccl), f64::from(ours.cuda)])?;
    let versions = |numbers: &[f64]| match numbers {
        [nccl, cuda] => Versions { nccl: *nccl as i32, cuda: *cuda as i32 },
        _ => Versions { nccl: 0, cuda: 0 },
    };
    let all: Vec<Versions> = all.iter().map(|numbers| versions(numbers)).collect();
    let Some(rank) = all.iter().position(|theirs| *theirs != ours) else { return Ok(()) };
    let kind = ErrorKind::Mixture { rank, theirs: all[rank].to_string(), ours: ours.to_string() };
    Err(ring.fail(Operation::Connect, Fault::own(kind)))
}

/// Conditions that the calling thread polls while an operation runs.
struct Watch<'a> {
    ring: &'a HostCollective,
    started: Instant,
    timeout: Duration,
}

impl<'a> Watch<'a> {
    fn new(ring: &'a HostCollective, operation: Operation, bytes: usize) -> Self {
        let limits = Limits::new(ring.base_timeout(), DEVICE_BANDWIDTH_FLOOR, ring.world_size());
        let timeout = limits.of(operation, bytes);
        Self { ring, started: Instant::now(), timeout }
    }

    /// Polls until `is_done`, or until the operation has to fail.
    fn until(&self, what: &str, is_done: impl Fn() -> Result<bool, DeviceError>) -> Result<(), Fault> {
        let mut lost = None;
        let mut pause = Pause::default();
        loop {
            if let Some(kind) = self.ring.reason() {
                return Err(Fault::own(kind));
            }
            if is_done().map_err(own)? {
                return Ok(());
            }
            if let Some(peer) = self.ring.lost_neighbour() {
                let since = *lost.get_or_insert_with(Instant::now);
                if since.elapsed() >= GRACE {
                    return Err(Fault::with(peer, ErrorKind::PeerClosed));
                }
            }
            if self.started.elapsed() >= self.timeout {
                return Err(Fault::own(ErrorKind::TimedOut { timeout: self.timeout, waiting_for: what.to_owned() }));
            }
            pause.take();
        }
    }
}

/// Polls until `is_done`; returns false at the deadline.
fn pause_until(deadline: Instant, is_done: impl Fn() -> Result<bool, DeviceError>) -> Result<bool, DeviceError> {
    let mut pause = Pause::default();
    while !is_done()? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        pause.take();
    }
    Ok(true)
}

/// Back-off between polls: none at first, then growing pauses.
#[derive(Default)]
struct Pause {
    since: Option<Instant>,
    length: Duration,
}

impl Pause {
    fn take(&mut self) {
        if self.since.get_or_insert_with(Instant::now).elapsed() < SPIN {
            thread::yield_now();
            return;
        }
        self.length = (2 * self.length).clamp(PAUSE.0, PAUSE.1);
        thread::sleep(self.length);
    }
}

fn own(error: DeviceError) -> Fault {
    Fault::own(ErrorKind::Device(error))
}
