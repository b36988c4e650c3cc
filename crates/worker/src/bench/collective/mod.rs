//! `pacs-worker bench collective`: preflight of the network between ranks.

mod measure;
mod report;
mod verdict;

use std::net::ToSocketAddrs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use pacs_collective::{
    AbortHandle, Collective, CudaDevice, GroupConfig, HostCollective, HostListener, Meeting, NcclCollective, meet,
};
use pacs_types::Generation;

use measure::{Memory, Work};

/// Bus bandwidth of every collective operation, and a search for ranks or links that slow the others down.
///
/// JSON lines go to the standard output of rank 0, a table to its standard error. Either `--ranks` starts that many
/// processes on this machine, or one process per rank is started with `--rank`, `--world`, and rank 0's `--address`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    Four ranks on this machine, over TCP:\n    pacs-worker bench collective --ranks 4\n  \
    One GPU, then all eight of a node:\n    pacs-worker bench collective --backend nccl --ranks 1\n    \
    pacs-worker bench collective --backend nccl --ranks 8\n  \
    Two nodes with a GPU each (the same address on both, a port of the first):\n    \
    node-0$ pacs-worker bench collective --backend nccl --rank 0 --world 2 --address node-0:7800\n    \
    node-1$ pacs-worker bench collective --backend nccl --rank 1 --world 2 --address node-0:7800")]
pub(crate) struct Arguments {
    /// Backend to measure.
    #[arg(long, value_enum, default_value_t = Backend::Host)]
    backend: Backend,
    /// Start this many ranks on this machine, each on the device of its number.
    #[arg(long, conflicts_with_all = ["rank", "world", "address"], required_unless_present = "rank", value_parser = crate::bounds::usize_to(4096))]
    ranks: Option<usize>,
    /// Take part as this rank, counted from 0.
    #[arg(long, requires_all = ["world", "address"], value_parser = crate::bounds::usize_to(4096))]
    rank: Option<usize>,
    /// Number of ranks.
    #[arg(long, requires = "rank", value_parser = crate::bounds::usize_to(4096))]
    world: Option<usize>,
    /// Address at which rank 0 waits for the others, host:port.
    #[arg(long, requires = "rank")]
    address: Option<String>,
    /// Buffer sizes in bytes; each is rounded up to whole numbers for every rank.
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 262_144, 4_194_304, 67_108_864], value_parser = crate::bounds::usize_to(1 << 36))]
    sizes: Vec<usize>,
    /// Approximate seconds of one measurement.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Seconds that the ranks wait for each other.
    #[arg(long, default_value_t = 60, value_parser = crate::bounds::u64_to(crate::bounds::MOST_SECONDS))]
    timeout: u64,
    /// Index of the visible GPU that this rank uses.
    #[arg(long, default_value_t = 0, requires = "rank", value_parser = crate::bounds::usize_to(4096))]
    device_index: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// A TCP ring between processors.
    Host,
    /// NCCL between NVIDIA GPUs.
    Nccl,
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Nccl => "nccl",
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.sizes.is_empty() || arguments.sizes.contains(&0) {
        bail!("measure: sizes must be above 0");
    }
    if !(arguments.seconds > 0.0 && arguments.seconds <= 60.0) {
        bail!("measure for {} s: between 0 and 60 s are possible", arguments.seconds);
    }
    let (rank, world_size) = match (arguments.ranks, arguments.rank, arguments.world) {
        (Some(ranks), ..) => (0, ranks),
        (None, Some(rank), Some(world_size)) => (rank, world_size),
        _ => bail!("measure: give --ranks, or --rank with --world and --address"),
    };
    if rank >= world_size {
        bail!("take part as rank {rank} of {world_size}: ranks count from 0");
    }
    let device = match arguments.backend {
        Backend::Host => None,
        Backend::Nccl => Some(CudaDevice::open(arguments.device_index).context("use the `nccl` backend")?),
    };
    let (listener, addresses, processes) = assemble(arguments, rank, world_size)?;
    let party = Party { listener, addresses, rank, device, timeout: Duration::from_secs(arguments.timeout.max(1)) };
    measure_all(arguments, &party)?;
    processes.into_iter().try_for_each(Process::finish)
}

/// Starts the other ranks if requested, and collects the address of every rank.
fn assemble(
    arguments: &Arguments,
    rank: usize,
    world_size: usize,
) -> Result<(HostListener, Vec<String>, Vec<Process>)> {
    let timeout = Duration::from_secs(arguments.timeout.max(1));
    let Some(address) = &arguments.address else {
        let listener = HostListener::bind("127.0.0.1:0").context("join the ranks")?;
        let meeting = Meeting::open("127.0.0.1:0").context("join the ranks")?;
        let start = |rank| Process::start(arguments, rank, world_size, &meeting.place());
        let processes = (1..world_size).map(start).collect::<Result<Vec<_>>>()?;
        let addresses = meeting.gather(world_size, &listener, timeout).context("join the ranks")?;
        return Ok((listener, addresses, processes));
    };
    // Rank 0 tells the others the address that this rank's connection comes from, so it must listen there.
    let resolved = address.to_socket_addrs().ok().and_then(|mut resolved| resolved.next());
    let any = if resolved.is_some_and(|address| address.is_ipv6()) { "[::]:0" } else { "0.0.0.0:0" };
    let listener = HostListener::bind(any).context("join the ranks")?;
    let addresses = match rank {
        0 => {
            let meeting = Meeting::open(address).context("join the ranks")?;
            meeting.gather(world_size, &listener, timeout)
        }
        _ => meet(address, rank, world_size, &listener, timeout),
    };
    Ok((listener, addresses.context("join the ranks")?, Vec::new()))
}

fn measure_all(arguments: &Arguments, party: &Party) -> Result<()> {
    let everybody: Vec<usize> = (0..party.addresses.len()).collect();
    let mut collective = party.connect(&everybody, 1)?;
    let report = report::Report::new(arguments.backend.name(), collective.as_ref());
    let mut lines = Vec::new();
    for operation in Work::ALL {
        for &size in &arguments.sizes {
            let mut memory = Memory::new(size, everybody.len(), party.device.as_ref())?;
            let line = measure::operation(collective.as_mut(), operation, &mut memory, arguments.seconds)?;
            report.line(&line);
            lines.push(line);
        }
    }
    let probes = measure::probes(collective.as_mut(), party)?;
    collective.barrier().context("end the measurement")?;
    report.end(&lines, &probes);
    Ok(())
}

/// This rank, with the addresses of all ranks.
struct Party {
    listener: HostListener,
    addresses: Vec<String>,
    rank: usize,
    device: Option<CudaDevice>,
    timeout: Duration,
}

impl Party {
    /// Joins a communicator of some ranks, which must all call it; `number` distinguishes communicators.
    fn connect(&self, members: &[usize], number: u64) -> Result<Box<dyn Collective>> {
        let rank = members.iter().position(|member| *member == self.rank).context("join a group of others")?;
        let addresses = members.iter().map(|member| self.addresses[*member].clone()).collect();
        let generation = Generation(number);
        let group = GroupConfig { job: "bench".into(), generation, rank, addresses, timeout: self.timeout };
        let abort = AbortHandle::new();
        Ok(match &self.device {
            None => Box::new(HostCollective::connect_abortable(&self.listener, group, abort).context("join the ring")?),
            Some(device) => Box::new(
                NcclCollective::connect(&self.listener, group, abort, device).context("join the communicator")?,
            ),
        })
    }
}

/// Another rank on this machine, killed on drop.
struct Process {
    rank: usize,
    child: Child,
}

impl Process {
    fn start(arguments: &Arguments, rank: usize, world_size: usize, place: &str) -> Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let sizes: Vec<String> = arguments.sizes.iter().map(ToString::to_string).collect();
        let child = Command::new(program)
            .args(["bench", "collective", "--backend", arguments.backend.name()])
            .args(["--rank", &rank.to_string(), "--world", &world_size.to_string(), "--address", place])
            .args(["--sizes", &sizes.join(","), "--seconds", &arguments.seconds.to_string()])
            .args(["--timeout", &arguments.timeout.to_string(), "--device-index", &rank.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start rank {rank}"))?;
        Ok(Self { rank, child })
    }

    fn finish(mut self) -> Result<()> {
        let status = self.child.wait().with_context(|| format!("wait for rank {}", self.rank))?;
        if !status.success() {
            bail!("measure: rank {} ended with {status}", self.rank);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both calls fail if the process has ended, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
