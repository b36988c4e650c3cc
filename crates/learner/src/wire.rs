//! The ranks' exchanges, one after the other on a thread of their own, so that computing goes on meanwhile.
//!
//! Every rank asks for the same exchanges in the same order; that they are made in that order, and what is in their
//! way, is the communicator's business.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use pacs_collective::Collective;
use pacs_torch::tch::{Device, Tensor};
use pacs_torch::{bytes, bytes_mut, f32_mut, f32_ref};

use crate::trainer::TrainError;

/// Exchanges that may wait to be made; asking for more waits. Enough for all buckets of the largest models.
const QUEUE: usize = 1024;

/// What is to be exchanged. Tensors are contiguous and must not be touched until the exchange was waited for.
#[derive(Debug)]
pub(crate) enum Exchange {
    /// Adds up a float32 buffer over the ranks.
    AllReduce(Tensor),
    /// Adds up a float32 buffer over the ranks and leaves each rank its part; adds the part to `sum` where there is one.
    ReduceScatter { buffer: Tensor, sum: Option<Tensor> },
    /// Fills a buffer with the parts of all ranks; this rank's is `part`, or in its place already.
    AllGather { buffer: Tensor, part: Option<Tensor> },
    /// A few numbers of each rank.
    Numbers(Vec<f64>),
}

/// Numbers of each rank; empty for exchanges of tensors.
type Outcome = Result<Vec<Vec<f64>>, TrainError>;

/// What was exchanged, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Traffic {
    /// Bytes of the buffers that were exchanged.
    pub(crate) bytes: u64,
    /// Time that exchanges took.
    pub(crate) busy: Duration,
    /// Time that computing waited for them.
    pub(crate) waited: Duration,
}

/// Hands exchanges to the thread.
#[derive(Debug)]
pub(crate) struct Wire<'scope> {
    requests: Option<SyncSender<(Exchange, SyncSender<Outcome>)>>,
    thread: ScopedJoinHandle<'scope, Traffic>,
    waited: Duration,
}

/// An exchange that was asked for.
#[derive(Debug)]
pub(crate) struct Pending(Receiver<Outcome>);

impl<'scope> Wire<'scope> {
    /// Starts the thread, which borrows the communicator for as long as the scope lasts.
    pub(crate) fn start<'env>(scope: &'scope Scope<'scope, 'env>, collective: &'env mut dyn Collective) -> Self {
        let (requests, inbox) = sync_channel::<(Exchange, SyncSender<Outcome>)>(QUEUE);
        let thread = scope.spawn(move || {
            let mut traffic = Traffic::default();
            while let Ok((exchange, reply)) = inbox.recv() {
                let started = Instant::now();
                traffic.bytes += exchange.bytes();
                let outcome = exchange.make(collective);
                traffic.busy += started.elapsed();
                // Nobody waits any more when an earlier exchange has failed.
                let _ = reply.send(outcome);
            }
            traffic
        });
        Self { requests: Some(requests), thread, waited: Duration::ZERO }
    }

    /// Asks for an exchange.
    pub(crate) fn ask(&self, exchange: Exchange) -> Pending {
        let (reply, outcome) = sync_channel(1);
        let requests = self.requests.as_ref().expect("the wire is open until it is closed");
        // Should the thread be gone, waiting says so.
        let _ = requests.send((exchange, reply));
        Pending(outcome)
    }

    /// Waits until an exchange was made.
    pub(crate) fn wait(&mut self, pending: Pending) -> Outcome {
        let started = Instant::now();
        let outcome = pending.0.recv().unwrap_or(Err(TrainError::ExchangesEnded));
        self.waited += started.elapsed();
        outcome
    }

    /// What each rank passed, by rank.
    pub(crate) fn gather(&mut self, numbers: Vec<f64>) -> Outcome {
        let pending = self.ask(Exchange::Numbers(numbers));
        self.wait(pending)
    }

    /// Ends the thread.
    pub(crate) fn close(mut self) -> Traffic {
        self.requests = None;
        let traffic = self.thread.join().unwrap_or_default();
        Traffic { waited: self.waited, ..traffic }
    }
}

impl Exchange {
    fn bytes(&self) -> u64 {
        match self {
            Self::AllReduce(buffer) | Self::ReduceScatter { buffer, .. } | Self::AllGather { buffer, .. } => {
                (buffer.numel() * buffer.kind().elt_size_in_bytes()) as u64
            }
            Self::Numbers(numbers) => (numbers.len() * size_of::<f64>()) as u64,
        }
    }

    /// Makes it, on the thread that calls. Plain loops over slices: that of a step must not wake the threads that libtorch
    /// computes with.
    pub(crate) fn make(self, collective: &mut dyn Collective) -> Outcome {
        match self {
            Self::AllReduce(buffer) => on_host(buffer, |host| Ok(collective.all_reduce_sum(f32_mut(host)?)?))?,
            Self::ReduceScatter { buffer, sum } => {
                let (rank, ranks) = (collective.rank(), collective.world_size());
                let part = |whole: &Tensor| {
                    let length = whole.numel() as i64 / ranks as i64;
                    whole.narrow(0, rank as i64 * length, length)
                };
                on_host(buffer, |host| {
                    collective.reduce_scatter_sum(f32_mut(host)?)?;
                    let Some(sum) = sum else { return Ok(()) };
                    if sum.device() != Device::Cpu {
                        let mut sum = sum;
                        let _ = sum.g_add_(&part(host).to_device(sum.device()));
                        return Ok(());
                    }
                    let (mut sum, part) = (sum, part(host));
                    for (sum, part) in f32_mut(&mut sum)?.iter_mut().zip(f32_ref(&part)?) {
                        *sum += part;
                    }
                    Ok(())
                })?;
            }
            Self::AllGather { buffer, part } => {
                let (rank, ranks) = (collective.rank(), collective.world_size());
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

/// Works on a buffer in host memory, or on a copy there that is written back.
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
    /// Share of the exchanges' time that computing did not wait for; 1 when there was none.
    pub(crate) fn hidden_share(&self) -> f64 {
        if self.busy.is_zero() {
            return 1.0;
        }
        (1.0 - self.waited.as_secs_f64() / self.busy.as_secs_f64()).max(0.0)
    }
}
