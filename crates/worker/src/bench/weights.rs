//! `pacs-worker bench weights`.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_broadcast::CollectiveTransport;
use pacs_model::ModelConfig;
use pacs_rollout::MappedWeights;
use pacs_runtime::net::{PeerRole, Security};
use pacs_torch::bytes;
use pacs_torch::tch::{Device, Kind};
use pacs_types::WorkerId;
use pacs_weights::{
    Announcement, DataServer, Distribution, FetchOptions, GroupTransport, HostStore, Received, Receiver, ServerOptions,
    Shelf, Source, Transport, VersionId, WeightKind, Whole,
};
use serde_json::json;

use super::{median, print, shape, work};

/// Run id that stores and servers of the benchmark share.
const RUN: &str = "bench";

/// Delivery of a weight version to rollout workers: `shared` (a file that processes of a host map) compared with a
/// plain memory copy, `stream` and `broadcast` (the ring of `--weights-transport host`) over the loopback interface, a tree of receivers, and the
/// pause of decoding when
/// weights are swapped.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
                  pacs-worker bench weights --shape smollm2-135m --threads 2\n  \
                  pacs certs certs && pacs-worker bench weights --shape smollm2-135m --tls-dir certs --receivers 16 --link-rate 40")]
pub(crate) struct Arguments {
    #[command(flatten)]
    shape: shape::Arguments,
    /// Folder with the certificates of all roles (`pacs certs`), to measure `stream` and `broadcast` with TLS too.
    #[arg(long)]
    tls_dir: Option<PathBuf>,
    /// Hosts that receive the version concurrently, each in a store of its own, by a tree and by one broadcast [0: one host]
    #[arg(long, default_value_t = 0, value_parser = crate::bounds::u64_to(4096))]
    receivers: u64,
    /// Send rate of each simulated host in MB/s, when there are several: on one machine they share its processors,
    /// while a tree is for saturated links.
    #[arg(long, default_value_t = 40, value_parser = crate::bounds::u64_to(1_000_000))]
    link_rate: u64,
    /// Connections per receiver.
    #[arg(long, default_value_t = 4, value_parser = crate::bounds::usize_to(4096))]
    connections: usize,
    /// Folder of the stores. Default: shared memory.
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// Samples that decode while weights are swapped.
    #[arg(long, default_value_t = 8, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    rows: usize,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 5, value_parser = crate::bounds::usize_to(crate::bounds::MOST_TIMES))]
    repeats: usize,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.repeats == 0 || arguments.rows == 0 || arguments.connections == 0 || arguments.link_rate == 0 {
        bail!("measure: repeats, rows, connections and rate must be above 0");
    }
    let subject = arguments.shape.subject()?;
    if subject.device != Device::Cpu {
        bail!("measure weights on a device: what is measured is the way through host memory; take --device cpu");
    }
    let bench = Bench { arguments, described: subject.describe(), config: subject.config.clone() };
    let kind = if subject.kind == Kind::Float { WeightKind::Float32 } else { WeightKind::Bfloat16 };
    let content = bytes(&subject.parameters.flat).context("measure")?;
    let sender = Host::new(&arguments.folder, Security::Plain, None)?;
    bench.copy_and_share(&sender, kind, content)?;
    let published = sender.publish(VersionId::new(1, 1), kind, content)?;
    bench.stream(&sender, &published, &Security::Plain)?;
    let hosts = arguments.receivers.max(1);
    bench.broadcast(kind, content, &Security::Plain, &Security::Plain, hosts)?;
    if let Some(folder) = &arguments.tls_dir {
        let security = |role: PeerRole| pacs_runtime::launch::security(folder, role).context("read certificates");
        let sender = Host::new(&arguments.folder, security(PeerRole::Learner)?, None)?;
        let published = sender.publish(VersionId::new(1, 1), kind, content)?;
        bench.stream(&sender, &published, &security(PeerRole::Rollout)?)?;
        bench.broadcast(kind, content, &security(PeerRole::Learner)?, &security(PeerRole::Rollout)?, hosts)?;
    }
    if arguments.receivers > 0 {
        bench.tree(kind, content)?;
    }
    drop((published, sender));
    bench.pause(subject, kind)
}

struct Bench<'a> {
    arguments: &'a Arguments,
    described: serde_json::Value,
    config: ModelConfig,
}

impl Bench<'_> {
    /// `shared`: from the announcement to a mapping with all its pages, relative to a copy of the same bytes.
    fn copy_and_share(&self, sender: &Host, kind: WeightKind, content: &[u8]) -> Result<()> {
        let mut target = vec![0u8; content.len()];
        let (mut copies, mut writes, mut maps) = (vec![], vec![], vec![]);
        for repeat in 0..self.arguments.repeats as u64 {
            let started = Instant::now();
            target.copy_from_slice(content);
            copies.push(started.elapsed().as_secs_f64());
            std::hint::black_box(&target);
            let started = Instant::now();
            let published = sender.publish(VersionId::new(0, repeat), kind, content)?;
            writes.push(started.elapsed().as_secs_f64());
            let receiver =
                Receiver::new(Arc::clone(&sender.store), Shelf::default(), FetchOptions::new(Security::Plain, RUN));
            let started = Instant::now();
            let nobody = |_: &[String]| Err("it is on this host".to_owned());
            let received = receiver.receive(&announced(&published), &nobody, &AtomicBool::new(false));
            let mapped = MappedWeights::map(&received.context("receive")?, &self.config).context("map")?;
            maps.push(started.elapsed().as_secs_f64());
            drop(mapped);
            sender.store.retire_before(VersionId::new(1, 0));
        }
        let (copy, map) = (median(&copies), median(&maps));
        print(&json!({
            "bench": "weights", "transport": Transport::Shared.name(), "model": self.described, "bytes": content.len(),
            "seconds": map, "copy_seconds": copy, "share_of_a_copy": map / copy,
            "copy_gigabytes_per_second": rate(content.len() as u64, copy), "publish_seconds": median(&writes),
            "publish_gigabytes_per_second": rate(content.len() as u64, median(&writes)),
        }));
        Ok(())
    }

    /// `stream`: one receiver on the loopback interface.
    fn stream(&self, sender: &Host, published: &Whole, security: &Security) -> Result<()> {
        let bytes = published.description().bytes();
        let (mut seconds, before) = (Vec::new(), processor_seconds()?);
        for _ in 0..self.arguments.repeats {
            let host = Host::new(&self.arguments.folder, Security::Plain, None)?;
            let source = Source { address: sender.server.address().to_string(), role: PeerRole::Learner };
            let finder = |_: &[String]| Ok(vec![source.clone()]);
            let started = Instant::now();
            let received = self.receive(&host, security, published, &finder)?;
            seconds.push(started.elapsed().as_secs_f64());
            if received.fetched.bytes != bytes {
                bail!("measure: {} of {bytes} bytes came over the network", received.fetched.bytes);
            }
        }
        // Processor time is what it takes on an idle machine, however busy this one is.
        let processor = (processor_seconds()? - before) / self.arguments.repeats as f64;
        let tls = !matches!(security, Security::Plain);
        print(&json!({
            "bench": "weights", "transport": Transport::Stream.name(), "tls": tls, "receivers": 1, "bytes": bytes,
            "seconds": median(&seconds), "gigabytes_per_second": rate(bytes, median(&seconds)),
            "processor_seconds": processor, "connections": self.arguments.connections, "target": if tls { "1 or more" } else { "2 or more" },
        }));
        Ok(())
    }

    /// `broadcast`: hosts that take part in one broadcast each version, over the TCP ring of the collective.
    fn broadcast(
        &self,
        kind: WeightKind,
        content: &[u8],
        learner: &Security,
        rollout: &Security,
        receivers: u64,
    ) -> Result<()> {
        let transport = |security: &Security| -> Arc<dyn GroupTransport> {
            Arc::new(CollectiveTransport::host("127.0.0.1", security.clone()))
        };
        let options = ServerOptions { broadcast: Some(transport(learner)), ..ServerOptions::new(learner.clone(), RUN) };
        let sender = Host::with(&self.arguments.folder, options)?;
        let hosts = (0..receivers).map(|_| Host::new(&self.arguments.folder, Security::Plain, None));
        let hosts: Vec<Host> = hosts.collect::<Result<_>>()?;
        let bytes = content.len() as u64;
        let (mut seconds, mut processor) = (vec![], vec![]);
        for version in 0..=self.arguments.repeats as u64 {
            let published = sender.publish(VersionId::new(5, version), kind, content)?;
            let announcement = Announcement { address: sender.server.address().to_string(), ..announced(&published) };
            let (started, before) = (Instant::now(), processor_seconds()?);
            std::thread::scope(|scope| {
                let receive = |host: &Host| -> Result<()> {
                    let options = FetchOptions::new(rollout.clone(), RUN);
                    let receiver = Receiver::new(Arc::clone(&host.store), host.shelf.clone(), options);
                    let receiver = receiver.with_broadcast(Some(transport(rollout)));
                    let nobody = |_: &[String]| Err("only the broadcast is measured".to_owned());
                    let received = receiver.receive(&announcement, &nobody, &AtomicBool::new(false));
                    let fetched = received.context("receive")?.fetched;
                    if fetched.broadcast_bytes != bytes {
                        bail!("measure: {} of {bytes} bytes came by the broadcast", fetched.broadcast_bytes);
                    }
                    Ok(())
                };
                let threads: Vec<_> = hosts.iter().map(|host| scope.spawn(move || receive(host))).collect();
                threads.into_iter().try_for_each(|thread| match thread.join() {
                    Ok(received) => received,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })?;
            // The first round waits for hosts that may still come; later ones know how many there are.
            if version > 0 {
                seconds.push(started.elapsed().as_secs_f64());
                processor.push(processor_seconds()? - before);
            }
            for store in hosts.iter().map(|host| &host.store).chain([&sender.store]) {
                store.retire_before(VersionId::new(5, version + 1));
            }
        }
        print(&json!({
            "bench": "weights", "transport": "broadcast", "over": transport(learner).name(),
            "tls": !matches!(learner, Security::Plain), "receivers": receivers, "bytes": bytes, "seconds": median(&seconds),
            "gigabytes_per_second": rate(bytes, median(&seconds)), "processor_seconds": median(&processor),
        }));
        Ok(())
    }

    fn receive(
        &self,
        host: &Host,
        security: &Security,
        published: &Whole,
        finder: &pacs_weights::SourceFinder<'_>,
    ) -> Result<Received> {
        let options =
            FetchOptions { connections: self.arguments.connections, ..FetchOptions::new(security.clone(), RUN) };
        let receiver = Receiver::new(Arc::clone(&host.store), host.shelf.clone(), options);
        receiver.receive(&announced(published), finder, &AtomicBool::new(false)).context("receive")
    }

    /// Many hosts that relay to each other, compared with one.
    fn tree(&self, kind: WeightKind, content: &[u8]) -> Result<()> {
        let rate_limit = self.arguments.link_rate * 1_000_000;
        let mut seconds = Vec::new();
        for receivers in [1, self.arguments.receivers] {
            let sender = Host::new(&self.arguments.folder, Security::Plain, Some(rate_limit))?;
            let published = sender.publish(VersionId::new(2, receivers), kind, content)?;
            let tree = Mutex::new(Distribution::default());
            let lock = || tree.lock().unwrap_or_else(PoisonError::into_inner);
            lock().announce(published.description().id(), &sender.server.address().to_string());
            let hosts: Vec<Host> = (0..receivers)
                .map(|_| Host::new(&self.arguments.folder, Security::Plain, Some(rate_limit)))
                .collect::<Result<_>>()?;
            let started = Instant::now();
            std::thread::scope(|scope| {
                let threads = (1..).zip(&hosts).map(|(number, host)| {
                    let (published, lock) = (&published, &lock);
                    scope.spawn(move || {
                        let address = host.server.address().to_string();
                        let finder = |failed: &[String]| Ok(lock().find(WorkerId(number), &address, failed));
                        let received = self.receive(host, &Security::Plain, published, &finder);
                        lock().holds(WorkerId(number));
                        received.map(drop)
                    })
                });
                let threads: Vec<_> = threads.collect();
                threads.into_iter().try_for_each(|thread| match thread.join() {
                    Ok(received) => received,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })?;
            seconds.push(started.elapsed().as_secs_f64());
            let sent = sender.server.sent_bytes() as f64 / content.len() as f64;
            print(&json!({
                "bench": "weights", "transport": Transport::Stream.name(), "receivers": receivers,
                "bytes": content.len(), "seconds": seconds[seconds.len() - 1], "link_megabytes_per_second": self.arguments.link_rate,
                "copies_sent_by_the_learner": sent,
            }));
        }
        print(&json!({
            "bench": "weights", "receivers": self.arguments.receivers, "times_one_receiver": seconds[1] / seconds[0],
            "target": "less than 3",
        }));
        Ok(())
    }

    /// The pause of decoding when weights are swapped between two passes.
    fn pause(&self, subject: shape::Subject, kind: WeightKind) -> Result<()> {
        const NEW_TOKENS: u32 = 24;
        let rows = self.arguments.rows;
        let host = Host::new(&self.arguments.folder, Security::Plain, None)?;
        let content = bytes(&subject.parameters.flat).context("measure")?;
        let mut mapped = Vec::new();
        for version in 1..=self.arguments.repeats as u64 {
            let whole = host.publish(VersionId::new(3, version), kind, content)?;
            let received = Received { whole, transport: Transport::Shared, fetched: Default::default() };
            mapped.push(MappedWeights::map(&received, &self.config).context("map")?);
            // The mapping keeps the content after its file is removed.
            host.store.retire_before(VersionId::new(4, 0));
        }
        let mut engine = work::engine(subject, rows, 8 + NEW_TOKENS as usize, false)?;
        let (mut swaps, mut passes, mut firsts) = (vec![], vec![], vec![]);
        for (number, weights) in (0..).zip(mapped) {
            engine.submit(work::group(&self.config, number, rows as u32, 8, NEW_TOKENS)).context("measure")?;
            let timed = |engine: &mut pacs_rollout::Engine| -> Result<f64> {
                let started = Instant::now();
                engine.step().context("generate")?;
                Ok(started.elapsed().as_secs_f64())
            };
            // The first passes compute the prompt.
            (0..3).try_for_each(|_| timed(&mut engine).map(drop))?;
            (0..6).try_for_each(|_| timed(&mut engine).map(|pass| passes.push(pass)))?;
            let started = Instant::now();
            let old = weights.replace(&mut engine).context("swap weights")?;
            swaps.push(started.elapsed().as_secs_f64());
            drop(old);
            firsts.push(timed(&mut engine)?);
            while !engine.is_idle() {
                timed(&mut engine)?;
            }
        }
        let (swap, pass, first) = (median(&swaps), median(&passes), median(&firsts));
        print(&json!({
            "bench": "weights", "pause_seconds": swap + (first - pass).max(0.0), "swap_seconds": swap, "pass_seconds": pass,
            "pass_seconds_after_swap": first, "rows": rows, "target": "less than a pass",
        }));
        Ok(())
    }
}

/// Announcement of a learner that broadcasts to nobody.
fn announced(published: &Whole) -> Announcement {
    Announcement { description: published.description().clone(), address: String::new(), probe: None }
}

/// Processor time of all threads of this process (seconds), with a resolution of 10 ms.
fn processor_seconds() -> Result<f64> {
    // Linux reports hundredths of a second on every architecture.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").context("read /proc/self/stat")?;
    // The second field is the program's name in parentheses; user and system time are the twelfth and thirteenth
    // field after it.
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no name")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse);
    let ticks: Vec<f64> = ticks.collect::<Result<_, _>>().context("/proc/self/stat has no times")?;
    Ok(ticks.iter().sum::<f64>() / TICKS)
}

fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / seconds / 1e9
}

/// A simulated host: a store, and the server that relays from it.
struct Host {
    store: Arc<HostStore>,
    shelf: Shelf,
    server: DataServer,
    place: PathBuf,
}

impl Host {
    fn new(parent: &Path, security: Security, rate: Option<u64>) -> Result<Self> {
        Self::with(parent, ServerOptions { rate, ..ServerOptions::new(security, RUN) })
    }

    fn with(parent: &Path, options: ServerOptions) -> Result<Self> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let place = parent.join(format!("pacs-bench-weights-{}-{number}", std::process::id()));
        std::fs::create_dir(&place).with_context(|| format!("create folder `{}`", place.display()))?;
        let store = HostStore::open_in(RUN, std::slice::from_ref(&place)).context("open a store")?;
        let shelf = Shelf::default();
        let server = DataServer::start("127.0.0.1:0", shelf.clone(), options).context("listen on 127.0.0.1")?;
        Ok(Self { store: Arc::new(store), shelf, server, place })
    }

    fn publish(&self, id: VersionId, kind: WeightKind, content: &[u8]) -> Result<Whole> {
        let whole = self.store.publish(id, kind, content).context("publish")?;
        self.shelf.put(&whole);
        Ok(whole)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.place) {
            tracing::warn!("`{}` was not removed: {error}", self.place.display());
        }
    }
}
