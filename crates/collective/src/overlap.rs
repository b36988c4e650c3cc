//! Communication while the caller computes: operations run in order on a thread of their own.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Collective, CollectiveError, DeviceBuffer, ErrorKind, Operation};

/// Lends `collective` to a thread for as long as `body` runs, and returns what `body` returned together with the times.
///
/// `body` hands buffers over with the `start_…` methods of [`Overlap`], which return at once, and takes them back with
/// [`Overlap::wait`]. Every rank must start the same operations in the same order. At most `depth` operations wait in the
/// queue (at least one); `start_…` waits while it is full.
///
/// When `body` returns, operations that it did not wait for are awaited, and the first error among them is returned. When
/// it panics, operations that have not begun are left out, so that the other ranks fail at the latest at their deadlines.
/// An [`crate::AbortHandle`] taken from the communicator before works meanwhile, as always.
///
/// # Errors
///
/// The first error of an operation that `body` did not wait for.
pub fn overlap<'env, T>(
    collective: &'env mut dyn Collective,
    depth: usize,
    body: impl FnOnce(&mut Overlap<'env, '_>) -> T,
) -> Result<(T, OverlapTimes), CollectiveError> {
    let rank = collective.rank();
    let world_size = collective.world_size();
    let abandoned = AtomicBool::new(false);
    // A full queue makes the caller wait. Answers never wait: besides the queue, one operation is under way.
    let (jobs, inbox) = sync_channel(depth.max(1));
    let (outbox, answers) = sync_channel(depth.max(1) + 2);
    thread::scope(|scope| {
        let abandoned = &abandoned;
        scope.spawn(move || work(collective, &inbox, &outbox, abandoned));
        let mut overlap = Overlap {
            jobs: Some(jobs),
            answers,
            ready: VecDeque::new(),
            started: 0,
            collected: 0,
            times: OverlapTimes::default(),
            abandoned,
            rank,
            world_size,
        };
        let result = body(&mut overlap);
        overlap.finish().map(|times| (result, times))
    })
}

/// Memory that was handed over for an operation, and comes back when it is done.
#[derive(Debug)]
pub enum Lent<'env> {
    /// Numbers in host memory.
    Numbers(&'env mut [f32]),
    /// Bytes in host memory.
    Bytes(&'env mut [u8]),
    /// Memory of a device.
    Device(DeviceBuffer),
}

/// An operation that was started; [`Overlap::wait`] redeems it, once.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "an operation is done, and its error known, when it was waited for"]
pub struct Ticket(u64);

/// How much of the communication the computation hid.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OverlapTimes {
    /// Time that the operations took, one after the other.
    pub communicating: Duration,
    /// Time that the caller stood still for them: in `wait`, or at a full queue.
    pub waited: Duration,
    /// Operations.
    pub operations: u64,
}

impl OverlapTimes {
    /// Share of the communication during which the caller did something else, in `0..=1`; 1 when there was none.
    #[must_use]
    pub fn hidden_share(&self) -> f64 {
        if self.communicating.is_zero() {
            return 1.0;
        }
        (1.0 - self.waited.as_secs_f64() / self.communicating.as_secs_f64()).clamp(0.0, 1.0)
    }

    /// Adds another stretch of work.
    pub fn add(&mut self, other: Self) {
        self.communicating += other.communicating;
        self.waited += other.waited;
        self.operations += other.operations;
    }
}

/// The caller's side of a communicator that is at work elsewhere; see [`overlap`].
///
/// Buffers live for `'env`, longer than the thread does, so that no ticket can be forgotten to any harm.
#[derive(Debug)]
pub struct Overlap<'env, 'scope> {
    /// Absent when everything was handed over.
    jobs: Option<SyncSender<Job<'env>>>,
    answers: Receiver<Answer<'env>>,
    /// Answers that came before they were asked for, in the order of tickets.
    ready: VecDeque<(u64, Answer<'env>)>,
    started: u64,
    collected: u64,
    times: OverlapTimes,
    abandoned: &'scope AtomicBool,
    rank: usize,
    world_size: usize,
}

#[derive(Debug)]
enum Job<'env> {
    AllReduceSum(&'env mut [f32]),
    ReduceScatterSum(&'env mut [f32]),
    AllGather(&'env mut [u8]),
    AllReduceSumDevice(DeviceBuffer),
    ReduceScatterSumDevice(DeviceBuffer),
    AllGatherDevice(DeviceBuffer),
    /// Its answer has a channel of its own, because the caller waits for it at once.
    AllGatherF64(Vec<f64>, SyncSender<Gathered>),
}

type Gathered = (Duration, Result<Vec<Vec<f64>>, CollectiveError>);

#[derive(Debug)]
struct Answer<'env> {
    took: Duration,
    result: Result<Lent<'env>, CollectiveError>,
}

impl<'env> Overlap<'env, '_> {
    /// This rank, `0..world_size`.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are; at least one.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Starts [`Collective::all_reduce_sum`].
    pub fn start_all_reduce_sum(&mut self, data: &'env mut [f32]) -> Ticket {
        self.start(Job::AllReduceSum(data))
    }

    /// Starts [`Collective::reduce_scatter_sum`].
    pub fn start_reduce_scatter_sum(&mut self, data: &'env mut [f32]) -> Ticket {
        self.start(Job::ReduceScatterSum(data))
    }

    /// Starts [`Collective::all_gather`].
    pub fn start_all_gather(&mut self, data: &'env mut [u8]) -> Ticket {
        self.start(Job::AllGather(data))
    }

    /// Starts [`Collective::all_reduce_sum_device`]. The device begins when the work is done that the buffer's stream held
    /// when the buffer was made.
    pub fn start_all_reduce_sum_device(&mut self, data: DeviceBuffer) -> Ticket {
        self.start(Job::AllReduceSumDevice(data))
    }

    /// Starts [`Collective::reduce_scatter_sum_device`].
    pub fn start_reduce_scatter_sum_device(&mut self, data: DeviceBuffer) -> Ticket {
        self.start(Job::ReduceScatterSumDevice(data))
    }

    /// Starts [`Collective::all_gather_device`].
    pub fn start_all_gather_device(&mut self, data: DeviceBuffer) -> Ticket {
        self.start(Job::AllGatherDevice(data))
    }

    /// Waits until an operation is done, and returns the memory that it worked on.
    ///
    /// # Errors
    ///
    /// What the operation itself says. The communicator has then ended, and what was started after it fails, too.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Lent<'env>, CollectiveError> {
        let since = Instant::now();
        while self.collected <= ticket.0 && self.receive() {}
        self.times.waited += since.elapsed();
        let place = self.ready.iter().position(|(number, _)| *number == ticket.0);
        match place.and_then(|place| self.ready.remove(place)) {
            Some((_, answer)) => answer.result,
            None => Err(self.gone()),
        }
    }

    /// [`Collective::all_gather_f64`], after everything that was started before.
    ///
    /// # Errors
    ///
    /// As the operation itself.
    pub fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        let (reply, answer) = sync_channel(1);
        self.hand_over(Job::AllGatherF64(mine.to_vec(), reply));
        let since = Instant::now();
        let answer = answer.recv();
        self.times.waited += since.elapsed();
        let Ok((took, result)) = answer else { return Err(self.gone()) };
        self.count(took);
        result
    }

    fn start(&mut self, job: Job<'env>) -> Ticket {
        let ticket = Ticket(self.started);
        self.started += 1;
        self.hand_over(job);
        ticket
    }

    fn hand_over(&mut self, job: Job<'env>) {
        // Room for the answers to what is under way, so that the thread never waits for this one to listen.
        while let Ok(answer) = self.answers.try_recv() {
            self.keep(answer);
        }
        let mut job = job;
        let since = Instant::now();
        // Without a thread there is nobody to hand over to: waiting for the answer says so.
        while let Some(Err(TrySendError::Full(waiting))) = self.jobs.as_ref().map(|jobs| jobs.try_send(job)) {
            job = waiting;
            self.receive();
            self.times.waited += since.elapsed();
        }
    }

    /// Takes the next answer, waiting for it; false when there will be none.
    fn receive(&mut self) -> bool {
        let Ok(answer) = self.answers.recv() else { return false };
        self.keep(answer);
        true
    }

    fn keep(&mut self, answer: Answer<'env>) {
        self.count(answer.took);
        self.ready.push_back((self.collected, answer));
        self.collected += 1;
    }

    fn count(&mut self, took: Duration) {
        self.times.communicating += took;
        self.times.operations += 1;
    }

    fn gone(&self) -> CollectiveError {
        let kind = ErrorKind::Ended { first: "the thread of the communication is gone".to_owned() };
        CollectiveError { operation: Operation::Connect, rank: self.rank, peer: None, kind }
    }

    fn finish(mut self) -> Result<OverlapTimes, CollectiveError> {
        self.jobs = None;
        let since = Instant::now();
        while self.collected < self.started && self.receive() {}
        self.times.waited += since.elapsed();
        match self.ready.drain(..).find_map(|(_, answer)| answer.result.err()) {
            Some(error) => Err(error),
            None => Ok(self.times),
        }
    }
}

impl Drop for Overlap<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.abandoned.store(true, Ordering::Relaxed);
        }
    }
}

fn work<'env>(
    collective: &mut dyn Collective,
    jobs: &Receiver<Job<'env>>,
    answers: &SyncSender<Answer<'env>>,
    abandoned: &AtomicBool,
) {
    for job in jobs {
        if abandoned.load(Ordering::Relaxed) {
            return;
        }
        let since = Instant::now();
        let result = match job {
            Job::AllReduceSum(data) => collective.all_reduce_sum(data).map(|()| Lent::Numbers(data)),
            Job::ReduceScatterSum(data) => collective.reduce_scatter_sum(data).map(|()| Lent::Numbers(data)),
            Job::AllGather(data) => collective.all_gather(data).map(|()| Lent::Bytes(data)),
            Job::AllReduceSumDevice(data) => collective.all_reduce_sum_device(&data).map(|()| Lent::Device(data)),
            Job::ReduceScatterSumDevice(data) => {
                collective.reduce_scatter_sum_device(&data).map(|()| Lent::Device(data))
            }
            Job::AllGatherDevice(data) => collective.all_gather_device(&data).map(|()| Lent::Device(data)),
            Job::AllGatherF64(mine, reply) => {
                let result = collective.all_gather_f64(&mine);
                // The caller waits for it, unless it has panicked.
                let _ = reply.send((since.elapsed(), result));
                continue;
            }
        };
        // A caller that has panicked does not listen any more.
        if answers.send(Answer { took: since.elapsed(), result }).is_err() {
            return;
        }
    }
}
