use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use pacs_collective::{Collective, CollectiveError, CudaDevice, DeviceMemory, Operation};

use super::Party;
use crate::bench::median;

/// Buffer size of the link and memory probes (bytes).
const PROBE_BYTES: usize = 16 << 20;
/// Repetitions of a probe; the median counts.
const PROBES: usize = 7;
/// Fewest and most repetitions of one measurement.
const REPETITIONS: (f64, f64) = (3.0, 1000.0);

/// A collective operation to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
}

impl Work {
    pub(crate) const ALL: [Self; 4] = [Self::AllReduce, Self::ReduceScatter, Self::AllGather, Self::Broadcast];

    pub(crate) fn operation(self) -> Operation {
        match self {
            Self::AllReduce => Operation::AllReduceSum,
            Self::ReduceScatter => Operation::ReduceScatterSum,
            Self::AllGather => Operation::AllGather,
            Self::Broadcast => Operation::Broadcast,
        }
    }

    /// Bytes that cross the busiest link per byte of the buffer, at best. It makes operations and world sizes
    /// comparable with each other and with the hardware's bandwidth.
    pub(crate) fn bus_factor(self, world_size: usize) -> f64 {
        let others = (world_size as f64 - 1.0) / world_size as f64;
        match self {
            Self::AllReduce => 2.0 * others,
            Self::ReduceScatter | Self::AllGather => others,
            Self::Broadcast => f64::from(u8::from(world_size > 1)),
        }
    }
}

/// The buffer of a measurement.
pub(crate) enum Memory {
    Host(Vec<f32>),
    Device(DeviceMemory, usize),
}

impl Memory {
    /// Allocates at least `size` bytes, divisible into equal parts for all ranks.
    pub(crate) fn new(size: usize, world_size: usize, device: Option<&CudaDevice>) -> Result<Self> {
        let numbers = size.div_ceil(size_of::<f32>()).next_multiple_of(world_size);
        let Some(device) = device else { return Ok(Self::Host(vec![0.0; numbers])) };
        let bytes = numbers * size_of::<f32>();
        let mut memory = device.allocate(bytes).with_context(|| format!("make a buffer of {bytes} bytes"))?;
        memory.upload(&vec![0; bytes]).context("clear the buffer")?;
        Ok(Self::Device(memory, bytes))
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Host(numbers) => size_of_val(numbers.as_slice()),
            Self::Device(_, bytes) => *bytes,
        }
    }

    fn run(&mut self, work: Work, collective: &mut dyn Collective) -> Result<()> {
        let done: Result<(), CollectiveError> = match self {
            Self::Host(numbers) => match work {
                Work::AllReduce => collective.all_reduce_sum(numbers),
                Work::ReduceScatter => collective.reduce_scatter_sum(numbers),
                Work::AllGather => collective.all_gather(as_bytes(numbers)),
                Work::Broadcast => collective.broadcast(0, as_bytes(numbers)),
            },
            Self::Device(memory, _) => memory.lend(|data| match work {
                Work::AllReduce => collective.all_reduce_sum_device(data),
                Work::ReduceScatter => collective.reduce_scatter_sum_device(data),
                Work::AllGather => collective.all_gather_device(data),
                Work::Broadcast => collective.broadcast_device(0, data),
            })?,
        };
        done.context("measure")
    }
}

/// Result of one operation at one size.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) work: Work,
    pub(crate) bytes: usize,
    pub(crate) repetitions: usize,
    /// Mean seconds per call, by rank.
    pub(crate) seconds: Vec<f64>,
}

impl Line {
    /// Mean seconds per call on the slowest rank.
    pub(crate) fn longest(&self) -> f64 {
        self.seconds.iter().copied().fold(0.0, f64::max)
    }
}

/// Measures an operation for about `seconds`.
pub(crate) fn operation(
    collective: &mut dyn Collective,
    work: Work,
    memory: &mut Memory,
    seconds: f64,
) -> Result<Line> {
    // The first call sets up buffers and connections; the second tells how many repetitions fit.
    memory.run(work, collective)?;
    let first = time(|| memory.run(work, collective))?;
    let slowest = by_rank(collective, first)?.into_iter().fold(0.0, f64::max);
    let repetitions = (seconds / slowest.max(1e-9)).clamp(REPETITIONS.0, REPETITIONS.1) as usize;
    collective.barrier().context("measure")?;
    let total = time(|| (0..repetitions).try_for_each(|_| memory.run(work, collective)))?;
    let seconds = by_rank(collective, total / repetitions as f64)?;
    Ok(Line { work, bytes: memory.bytes(), repetitions, seconds })
}

/// Probes that tell a slow rank from ranks that wait for it: in a ring, all take the same time.
#[derive(Clone, Debug)]
pub(crate) struct Probes {
    /// Seconds of a pass over memory, without the network, by rank.
    pub(crate) memory: Vec<f64>,
    /// Seconds of an all-reduce between rank `i` and the next rank, by `i`. A world of two has one link, a world
    /// of one none.
    pub(crate) links: Vec<f64>,
}

pub(crate) fn probes(collective: &mut dyn Collective, party: &Party) -> Result<Probes> {
    let world_size = party.addresses.len();
    let memory = by_rank(collective, memory_probe(party.device.as_ref())?)?;
    let mut links = Vec::new();
    for first in 0..if world_size == 2 { 1 } else { world_size } {
        let pair = [first, (first + 1) % world_size];
        let mut mine = 0.0;
        if world_size > 1 && pair.contains(&party.rank) {
            let mut both = party.connect(&pair, 2 + first as u64)?;
            let mut memory = Memory::new(PROBE_BYTES, 2, party.device.as_ref())?;
            memory.run(Work::AllReduce, both.as_mut())?;
            let times = (0..PROBES).map(|_| time(|| memory.run(Work::AllReduce, both.as_mut())));
            mine = median(&times.collect::<Result<Vec<f64>>>()?);
        }
        // One pair after the other, because concurrent links that share a switch or a card would slow each other down.
        let seconds = by_rank(collective, mine)?;
        links.push(pair.iter().map(|rank| seconds[*rank]).fold(0.0, f64::max));
    }
    links.truncate(if world_size > 1 { world_size } else { 0 });
    Ok(Probes { memory, links })
}

/// Times the addition of one buffer to another, or a copy within the device.
fn memory_probe(device: Option<&CudaDevice>) -> Result<f64> {
    let mut times = Vec::new();
    if let Some(device) = device {
        let mut memory = device.allocate(2 * PROBE_BYTES).context("make the buffer of the memory probe")?;
        for _ in 0..=PROBES {
            times.push(time(|| memory.copy_half().context("measure the device's memory"))?);
        }
        return Ok(median(&times[1..]));
    }
    let mut sums = vec![0f32; PROBE_BYTES / size_of::<f32>()];
    let addends = vec![1f32; sums.len()];
    for _ in 0..=PROBES {
        times.push(time(|| {
            sums.iter_mut().zip(black_box(&addends)).for_each(|(sum, addend)| *sum += addend);
            black_box(&mut sums);
            Ok(())
        })?);
    }
    Ok(median(&times[1..]))
}

fn by_rank(collective: &mut dyn Collective, mine: f64) -> Result<Vec<f64>> {
    let gathered = collective.all_gather_f64(&[mine]).context("gather the times")?;
    Ok(gathered.into_iter().map(|numbers| numbers.first().copied().unwrap_or(f64::NAN)).collect())
}

fn time(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    run()?;
    Ok(started.elapsed().as_secs_f64())
}

fn as_bytes(numbers: &mut [f32]) -> &mut [u8] {
    bytemuck::cast_slice_mut(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bus_factor_is_that_of_a_ring() {
        let factors = |world_size| Work::ALL.map(|work| work.bus_factor(world_size));
        assert_eq!(factors(1), [0.0, 0.0, 0.0, 0.0], "nothing leaves a world of one");
        assert_eq!(factors(2), [1.0, 0.5, 0.5, 1.0]);
        assert_eq!(factors(4), [1.5, 0.75, 0.75, 1.0]);
    }

    #[test]
    fn buffers_fall_into_equal_parts() -> Result<()> {
        for world_size in 1..6 {
            let memory = Memory::new(1001, world_size, None)?;
            assert!(memory.bytes() >= 1001 && memory.bytes() % (4 * world_size) == 0);
        }
        Ok(())
    }
}
