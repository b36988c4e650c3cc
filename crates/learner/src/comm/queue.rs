//! A queue of collective operations on a thread of its own, so that they overlap with computation.
//!
//! Every rank has to request the same exchanges in the same order. The communicator keeps that order and
//! deals with failures.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use pacs_collective::{AbortHandle, Collective, CudaDevice, Limits, Operation};
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{ExposeError, Exposed, bytes, bytes_mut, expose, f32_mut, f32_ref, i64_mut, i64_ref};

use crate::error::TrainError;

/// Capacity of the queue, enough for all buckets of the largest models; requests beyond it are refused.
const QUEUE: usize = 1024;
/// Margin beyond the communicator's own deadline, which fires first and has the better error message.
const GRACE: Duration = Duration::from_secs(30);

/// A collective operation. Tensors are contiguous, and must not be touched until the exchange was waited for.
#[derive(Debug)]
pub(crate) enum Exchange {
    /// Sums a buffer over the ranks: float32, or int64 in host memory.
    AllReduce(Tensor),
    /// Sums a buffer over the ranks and leaves each rank its part. Adds the part to `sum`, if there is one.
    ReduceScatter { buffer: Tensor, sum: Option<Tensor> },
    /// Fills a buffer with the parts of all ranks. This rank's is `part`, or already in its place.
    AllGather { buffer: Tensor, part: Option<Tensor> },
    /// All-gathers a few numbers of each rank.
    Numbers(Vec<f64>),
}

/// Numbers of each rank, by rank; empty for exchanges of tensors.
type Outcome = Result<Vec<Vec<f64>>, TrainError>;

/// Volume and time of a step's exchanges.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Traffic {
    /// Total size of the exchanged buffers (bytes).
    pub(crate) bytes: u64,
    /// Time spent in collective operations.
    pub(crate) busy: Duration,
    /// Time that the trainer spent waiting for them, which is the part that was not hidden.
    pub(crate) waited: Duration,
}

/// Handle of the exchange thread.
#[derive(Debug)]
pub(crate) struct CollectiveQueue<'scope> {
    requests: Option<SyncSender<Request>>,
    thread: ScopedJoinHandle<'scope, Traffic>,
    /// Disconnects when the thread has ended.
    ended: Receiver<()>,
    limits: Limits,
    grace: Duration,
    abort: AbortHandle,
    rank: usize,
    ranks: usize,
    /// Device whose memory the communicator exchanges directly; `None` copies through host memory.
    device: Option<CudaDevice>,
    /// Sum of the communicator's limits of all requests so far, which run one after the other.
    asked: Cell<Duration>,
    /// The part of `asked` that is known to be complete, and since when.
    made: (Duration, Instant),
    waited: Duration,
}

type Request = (Exchange, Option<Exposed>, SyncSender<Outcome>);

/// An exchange in flight.
#[derive(Debug)]
pub(crate) struct Pending {
    outcome: Result<Receiver<Outcome>, Refused>,
    operation: Operation,
    bytes: u64,
    asked_at: Instant,
    /// Value of [`CollectiveQueue::asked`] including this exchange.
    through: Duration,
}

/// Why a request was refused.
#[derive(Debug)]
enum Refused {
    QueueFull,
    Ended,
    NotExposed(ExposeError),
}

impl<'scope> CollectiveQueue<'scope> {
    /// Starts the thread, which borrows the communicator for the lifetime of the scope.
    pub(crate) fn start<'env>(scope: &'scope Scope<'scope, 'env>, collective: &'env mut dyn Collective) -> Self {
        Self::start_with(scope, collective, GRACE)
    }

    fn start_with<'env>(
        scope: &'scope Scope<'scope, 'env>,
        collective: &'env mut dyn Collective,
        grace: Duration,
    ) -> Self {
        let (requests, inbox) = sync_channel::<Request>(QUEUE);
        let (running, ended) = sync_channel::<()>(0);
        let limits = collective.limits();
        let abort = collective.abort_handle();
        let rank = collective.rank();
        let ranks = collective.world_size();
        let device = collective.device().cloned();
        let thread = scope.spawn(move || {
            let _running = running;
            let mut traffic = Traffic::default();
            while let Ok((exchange, exposed, reply)) = inbox.recv() {
                let started = Instant::now();
                traffic.bytes += exchange.bytes();
                let outcome = exchange.make(exposed.as_ref(), collective);
                traffic.busy += started.elapsed();
                // The receiver is gone if an earlier exchange has failed.
                let _ = reply.send(outcome);
            }
            traffic
        });
        let asked = Cell::default();
        let made = (Duration::ZERO, Instant::now());
        let waited = Duration::ZERO;
        Self { requests: Some(requests), thread, ended, limits, grace, abort, rank, ranks, device, asked, made, waited }
    }

    /// Queues an exchange.
    pub(crate) fn submit(&self, exchange: Exchange) -> Pending {
        let operation = exchange.operation();
        let bytes = exchange.bytes();
        let through = self.asked.get() + self.limits.of(operation, usize::try_from(bytes).unwrap_or(usize::MAX));
        let (reply, outcome) = sync_channel(1);
        let requests = self.requests.as_ref().expect("the queue is open until it is closed");
        let exposed = self.device.as_ref().map_or(Ok(None), |device| exchange.expose(device, self.rank, self.ranks));
        let sent = exposed.map_err(Refused::NotExposed).and_then(|exposed| {
            // Not `send`, which would wait without a deadline when an exchange hangs and the queue is full.
            requests.try_send((exchange, exposed, reply)).map_err(|error| match error {
                TrySendError::Full(_) => Refused::QueueFull,
                TrySendError::Disconnected(_) => Refused::Ended,
            })
        });
        let outcome = sent.map(|()| {
            self.asked.set(through);
            outcome
        });
        Pending { outcome, operation, bytes, asked_at: Instant::now(), through }
    }

    /// Waits for an exchange. An overdue one aborts the communicator, so that no other rank keeps waiting.
    pub(crate) fn wait(&mut self, pending: Pending) -> Outcome {
        let started = Instant::now();
        let due = self.due(&pending);
        let Pending { outcome, operation, bytes, through, .. } = pending;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(Refused::QueueFull) => return Err(TrainError::TooManyExchanges { most: QUEUE, operation }),
            Err(Refused::Ended) => return Err(TrainError::ExchangesEnded),
            Err(Refused::NotExposed(error)) => return Err(error.into()),
        };
        let outcome =
            outcome.recv_timeout(due.saturating_duration_since(started)).unwrap_or_else(|error| match error {
                RecvTimeoutError::Disconnected => Err(TrainError::ExchangesEnded),
                RecvTimeoutError::Timeout => {
                    let late = TrainError::Overdue { rank: self.rank, operation, bytes, waited: started.elapsed() };
                    self.abort.abort(late.to_string());
                    Err(late)
                }
            });
        if through > self.made.0 {
            self.made = (through, Instant::now());
        }
        self.waited += started.elapsed();
        outcome
    }

    /// Deadline of an exchange: incomplete ones before it come first, each with its own limit.
    fn due(&self, pending: &Pending) -> Instant {
        let (made, since) = self.made;
        since.max(pending.asked_at) + pending.through.saturating_sub(made) + self.grace
    }

    /// Gathers the numbers that each rank passed, by rank.
    pub(crate) fn gather(&mut self, numbers: Vec<f64>) -> Outcome {
        let pending = self.submit(Exchange::Numbers(numbers));
        self.wait(pending)
    }

    /// Time that computation has waited for exchanges so far.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// Ends the thread once every request is complete, or overdue.
    pub(crate) fn close(mut self) -> Traffic {
        self.requests = None;
        let left = self.asked.get().saturating_sub(self.made.0) + self.grace;
        if self.ended.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            self.abort.abort(format!("rank {} has waited {left:?} for its last exchanges to end", self.rank));
        }
        let traffic = self.thread.join().unwrap_or_default();
        Traffic { waited: self.waited, ..traffic }
    }
}

impl Exchange {
    fn operation(&self) -> Operation {
        match self {
            Self::AllReduce(_) => Operation::AllReduceSum,
            Self::ReduceScatter { .. } => Operation::ReduceScatterSum,
            Self::AllGather { .. } => Operation::AllGather,
            Self::Numbers(_) => Operation::AllGatherF64,
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::AllReduce(buffer) | Self::ReduceScatter { buffer, .. } | Self::AllGather { buffer, .. } => {
                (buffer.numel() * buffer.kind().elt_size_in_bytes()) as u64
            }
            Self::Numbers(numbers) => (numbers.len() * size_of::<f64>()) as u64,
        }
    }

    /// Exposes the buffer to the device's collectives, ordered after the computation queued so far. `None` if it is
    /// in host memory.
    fn expose(&self, device: &CudaDevice, rank: usize, ranks: usize) -> Result<Option<Exposed>, ExposeError> {
        match self {
            // Exact integer sums are exchanged in host memory.
            Self::AllReduce(buffer) | Self::ReduceScatter { buffer, .. } if buffer.kind() == Kind::Int64 => Ok(None),
            Self::AllReduce(buffer) | Self::ReduceScatter { buffer, .. } => expose(buffer, device),
            Self::AllGather { buffer, part } => {
                if let Some(part) = part {
                    part_of(buffer, rank, ranks).copy_(part);
                }
                expose(buffer, device)
            }
            Self::Numbers(_) => Ok(None),
        }
    }

    /// Runs the exchange on the calling thread, without the queue.
    pub(crate) fn make_now(self, collective: &mut dyn Collective) -> Outcome {
        let rank = collective.rank();
        let ranks = collective.world_size();
        let exposed = collective.device().map_or(Ok(None), |device| self.expose(device, rank, ranks))?;
        self.make(exposed.as_ref(), collective)
    }

    /// Runs the exchange: on the device if its buffer was exposed to it, otherwise through host memory.
    fn make(self, exposed: Option<&Exposed>, collective: &mut dyn Collective) -> Outcome {
        let Some(exposed) = exposed else {
            let alone = collective.world_size() == 1 && self.is_on_device();
            return if alone { self.make_alone() } else { self.make_on_host(collective) };
        };
        match self {
            Self::AllReduce(_) => collective.all_reduce_sum_device(exposed.buffer())?,
            Self::ReduceScatter { buffer, sum } => {
                collective.reduce_scatter_sum_device(exposed.buffer())?;
                if let Some(mut sum) = sum {
                    let _ = sum.g_add_(&part_of(&buffer, collective.rank(), collective.world_size()));
                }
            }
            // This rank's part was copied into the buffer when it was exposed.
            Self::AllGather { .. } => collective.all_gather_device(exposed.buffer())?,
            Self::Numbers(numbers) => return Ok(collective.all_gather_f64(&numbers)?),
        }
        Ok(Vec::new())
    }

    fn is_on_device(&self) -> bool {
        match self {
            Self::AllReduce(buffer) | Self::ReduceScatter { buffer, .. } | Self::AllGather { buffer, .. } => {
                buffer.device() != Device::Cpu
            }
            Self::Numbers(_) => false,
        }
    }

    /// Runs the exchange for a single rank, whose part is the whole: nothing leaves the device.
    fn make_alone(self) -> Outcome {
        match self {
            Self::AllReduce(_) => {}
            Self::ReduceScatter { buffer, sum } => {
                if let Some(mut sum) = sum {
                    let _ = sum.g_add_(&buffer);
                }
            }
            Self::AllGather { mut buffer, part } => {
                if let Some(part) = part {
                    buffer.copy_(&part);
                }
            }
            Self::Numbers(numbers) => return Ok(vec![numbers]),
        }
        Ok(Vec::new())
    }

    /// Runs the exchange in host memory. Sums are plain loops over slices, since tensor operations would wake
    /// libtorch's threads, which compute the step.
    fn make_on_host(self, collective: &mut dyn Collective) -> Outcome {
        match self {
            Self::AllReduce(mut buffer) if buffer.kind() == Kind::Int64 => {
                collective.all_reduce_sum_i64(i64_mut(&mut buffer)?)?;
            }
            Self::ReduceScatter { mut buffer, sum } if buffer.kind() == Kind::Int64 => {
                collective.reduce_scatter_sum_i64(i64_mut(&mut buffer)?)?;
                if let Some(mut sum) = sum {
                    let part = part_of(&buffer, collective.rank(), collective.world_size());
                    for (sum, part) in i64_mut(&mut sum)?.iter_mut().zip(i64_ref(&part)?) {
                        *sum = sum.wrapping_add(*part);
                    }
                }
            }
            Self::AllReduce(buffer) => on_host(buffer, |host| Ok(collective.all_reduce_sum(f32_mut(host)?)?))?,
            Self::ReduceScatter { buffer, sum } => {
                let rank = collective.rank();
                let ranks = collective.world_size();
                let part = |whole: &Tensor| part_of(whole, rank, ranks);
                on_host(buffer, |host| {
                    collective.reduce_scatter_sum(f32_mut(host)?)?;
                    let Some(sum) = sum else { return Ok(()) };
                    if sum.device() != Device::Cpu {
                        let mut sum = sum;
                        let _ = sum.g_add_(&part(host).to_device(sum.device()));
                        return Ok(());
                    }
                    let mut sum = sum;
                    let part = part(host);
                    for (sum, part) in f32_mut(&mut sum)?.iter_mut().zip(f32_ref(&part)?) {
                        *sum += part;
                    }
                    Ok(())
                })?;
            }
            Self::AllGather { buffer, part } => {
                let rank = collective.rank();
                let ranks = collective.world_size();
                on_host(buffer, |host| {
                    let host = bytes_mut(host)?;
                    if let Some(part) = part {
                        let length = host.len() / ranks;
                        let part = part.to_device(Device::Cpu);
                        host[rank * length..][..length].copy_from_slice(bytes(&part)?);
                    }
                    Ok(collective.all_gather(host)?)
                })?;
            }
            Self::Numbers(numbers) => return Ok(collective.all_gather_f64(&numbers)?),
        }
        Ok(Vec::new())
    }
}

/// One rank's part of a buffer of equal parts.
fn part_of(whole: &Tensor, rank: usize, ranks: usize) -> Tensor {
    let length = whole.numel() as i64 / ranks as i64;
    whole.narrow(0, rank as i64 * length, length)
}

/// Runs `work` on a buffer in host memory, or on a host copy that is then written back.
fn on_host(mut buffer: Tensor, work: impl FnOnce(&mut Tensor) -> Result<(), TrainError>) -> Result<(), TrainError> {
    if buffer.device() == Device::Cpu {
        return work(&mut buffer);
    }
    let mut host = buffer.to_device(Device::Cpu);
    work(&mut host)?;
    buffer.copy_(&host);
    Ok(())
}

impl Traffic {
    /// Share of the exchange time that computation hid; 1 without exchanges.
    pub(crate) fn hidden_share(&self) -> f64 {
        if self.busy.is_zero() {
            return 1.0;
        }
        (1.0 - self.waited.as_secs_f64() / self.busy.as_secs_f64()).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use pacs_collective::{CollectiveError, CudaDevice, DeviceBuffer, ErrorKind, HostCollective};

    use super::*;

    /// A communicator that misses its own limits: its operations end only when they are aborted.
    struct Stuck {
        abort: AbortHandle,
        limits: Limits,
    }

    impl Stuck {
        fn new(limit: Duration) -> Self {
            Self { abort: AbortHandle::new(), limits: Limits::new(limit, 1 << 30, 2) }
        }

        fn hang<T>(&self, operation: Operation) -> Result<T, CollectiveError> {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !self.abort.has_ended() {
                assert!(Instant::now() < deadline, "nobody aborts");
                std::thread::sleep(Duration::from_millis(1));
            }
            let kind = ErrorKind::Aborted { reason: "test".into() };
            Err(CollectiveError { operation, rank: 1, peer: None, kind })
        }
    }

    impl Collective for Stuck {
        fn rank(&self) -> usize {
            1
        }

        fn world_size(&self) -> usize {
            2
        }

        fn all_reduce_sum(&mut self, _: &mut [f32]) -> Result<(), CollectiveError> {
            self.hang(Operation::AllReduceSum)
        }

        fn reduce_scatter_sum(&mut self, _: &mut [f32]) -> Result<(), CollectiveError> {
            self.hang(Operation::ReduceScatterSum)
        }

        fn all_reduce_sum_i64(&mut self, _: &mut [i64]) -> Result<(), CollectiveError> {
            self.hang(Operation::AllReduceSum)
        }

        fn reduce_scatter_sum_i64(&mut self, _: &mut [i64]) -> Result<(), CollectiveError> {
            self.hang(Operation::ReduceScatterSum)
        }

        fn all_gather(&mut self, _: &mut [u8]) -> Result<(), CollectiveError> {
            self.hang(Operation::AllGather)
        }

        fn all_gather_f64(&mut self, _: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
            self.hang(Operation::AllGatherF64)
        }

        fn broadcast(&mut self, _: usize, _: &mut [u8]) -> Result<(), CollectiveError> {
            self.hang(Operation::Broadcast)
        }

        fn barrier(&mut self) -> Result<(), CollectiveError> {
            self.hang(Operation::Barrier)
        }

        fn limits(&self) -> Limits {
            self.limits
        }

        fn abort_handle(&self) -> AbortHandle {
            self.abort.clone()
        }

        fn device(&self) -> Option<&CudaDevice> {
            None
        }

        fn all_reduce_sum_device(&mut self, _: &DeviceBuffer) -> Result<(), CollectiveError> {
            self.hang(Operation::AllReduceSum)
        }

        fn reduce_scatter_sum_device(&mut self, _: &DeviceBuffer) -> Result<(), CollectiveError> {
            self.hang(Operation::ReduceScatterSum)
        }

        fn all_gather_device(&mut self, _: &DeviceBuffer) -> Result<(), CollectiveError> {
            self.hang(Operation::AllGather)
        }

        fn broadcast_device(&mut self, _: usize, _: &DeviceBuffer) -> Result<(), CollectiveError> {
            self.hang(Operation::Broadcast)
        }
    }

    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn an_exchange_that_does_not_end_is_named_and_ends_the_communicator() {
        let mut stuck = Stuck::new(SHORT);
        let abort = stuck.abort_handle();
        let (error, behind) = std::thread::scope(|scope| {
            let mut queue = CollectiveQueue::start_with(scope, &mut stuck, SHORT);
            let first = queue.submit(Exchange::AllReduce(Tensor::from_slice(&[1.0f32; 256])));
            let second = queue.submit(Exchange::Numbers(vec![1.0]));
            assert!(queue.due(&second) >= queue.due(&first) + SHORT, "it may begin when the first one has to be done");
            let error = queue.wait(first).expect_err("it hangs");
            assert!(abort.has_ended(), "no other rank waits for this one any more");
            queue.grace = Duration::from_secs(60);
            let behind = queue.wait(second).expect_err("the communicator has ended");
            queue.close();
            (error.to_string(), behind)
        });
        assert!(
            error.starts_with("rank 1 has waited ") && error.contains("for all_reduce_sum of 1024 bytes"),
            "{error}"
        );
        assert!(matches!(behind, TrainError::Collective(_)), "{behind}");
    }

    #[test]
    fn closing_does_not_wait_for_unclaimed_results() {
        let mut stuck = Stuck::new(SHORT);
        let abort = stuck.abort_handle();
        std::thread::scope(|scope| {
            let queue = CollectiveQueue::start_with(scope, &mut stuck, SHORT);
            drop(queue.submit(Exchange::Numbers(vec![1.0])));
            queue.close();
        });
        assert!(abort.has_ended());
    }

    #[test]
    fn a_full_queue_refuses() {
        let mut stuck = Stuck::new(Duration::from_secs(3600));
        let abort = stuck.abort_handle();
        std::thread::scope(|scope| {
            let mut queue = CollectiveQueue::start_with(scope, &mut stuck, SHORT);
            // The thread may already have taken the first one.
            let pending: Vec<Pending> = (0..QUEUE + 2).map(|_| queue.submit(Exchange::Numbers(vec![1.0]))).collect();
            let last = pending.into_iter().next_back().expect("there are some");
            let refused = queue.wait(last).expect_err("there is no room");
            assert!(matches!(refused, TrainError::TooManyExchanges { most: QUEUE, .. }), "{refused}");
            abort.abort("enough");
            queue.close();
        });
    }

    #[test]
    fn the_only_rank_has_all_of_it_on_its_device() {
        let buffer = Tensor::from_slice(&[1.0f32, 2.0]);
        let make = |on_device: bool| {
            let [reduced, scattered, sum, gathered] = [(); 4].map(|()| buffer.copy());
            let part = Some(Tensor::from_slice(&[5.0f32, 6.0]));
            let exchanges = [
                Exchange::AllReduce(reduced.shallow_clone()),
                Exchange::ReduceScatter { buffer: scattered, sum: Some(sum.shallow_clone()) },
                Exchange::AllGather { buffer: gathered.shallow_clone(), part },
                Exchange::Numbers(vec![3.0]),
            ];
            let make = |exchange: Exchange| {
                if on_device { exchange.make_alone() } else { exchange.make_on_host(&mut HostCollective::alone()) }
            };
            let made = exchanges.map(|exchange| make(exchange).expect("alone"));
            let found = [reduced, sum, gathered].map(|tensor| f32_ref(&tensor).expect("host").to_vec());
            (found, made)
        };
        let (found, made) = make(true);
        assert_eq!(found, [[1.0, 2.0], [2.0, 4.0], [5.0, 6.0]]);
        assert_eq!((found, made), make(false));
    }

    #[test]
    fn what_is_made_in_time_is_handed_over() {
        let mut alone = HostCollective::alone();
        std::thread::scope(|scope| {
            let mut queue = CollectiveQueue::start(scope, &mut alone);
            assert_eq!(queue.gather(vec![2.0, 3.0]).expect("alone"), [[2.0, 3.0]]);
            queue.gather(vec![1.0]).expect("alone");
            let third = queue.submit(Exchange::Numbers(vec![1.0]));
            let limit = queue.limits.of(Operation::AllGatherF64, 8) + GRACE;
            assert_eq!(queue.due(&third) - third.asked_at, limit, "what is made leaves no room to those after it");
            queue.wait(third).expect("alone");
            assert_eq!(queue.close().bytes, 32);
        });
        assert!(!alone.abort_handle().has_ended());
    }
}
