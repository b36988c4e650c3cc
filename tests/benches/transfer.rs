//! `cargo xtask bench transfer`: weights of the size of a large model between two hosts over mutual TLS, while either end is
//! killed in the middle, or bits of what one of two senders holds are flipped. Needs root, which makes the hosts as network namespaces.
//!
//! Prints a JSON line for each case: the time, and what has crossed the receiver's link in times of the model.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use pacs_protocol::v1;
use pacs_runtime::launch;
use pacs_runtime::net::PeerRole;
use pacs_tests::{Host, hosts, program};
use pacs_types::mix;
use pacs_weights::{
    Announcement, DataServer, FetchOptions, HostStore, Receiver, ServerOptions, Shelf, Source, VersionId, WeightKind,
};
use prost::Message;
use serde_json::{Value, json};

/// Run id that all processes share.
const RUN: &str = "0123456789abcdef0123456789abcdef";
/// No case may take longer.
const DEADLINE: Duration = Duration::from_secs(600);
/// Tells a process of this program which part it plays.
const PART: &str = "PACS_BENCH_TRANSFER";
/// The version that is sent.
const VERSION: (u64, u64) = (1, 1);

#[derive(Clone, Parser)]
struct Arguments {
    /// Size of the model in 10^9 bytes; 3.1 are 1.5 billion parameters in bfloat16. Every host holds it once, and a sender
    /// twice while it starts.
    #[arg(long, default_value_t = 1.0)]
    gigabytes: f64,
    /// Send rate of a sender in MB/s while something is killed, so that there is a middle to kill it in.
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// Where each host keeps its weights [default: shared memory]
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a process of the benchmark is told.
struct Part {
    is_sender: bool,
    /// Where this host keeps its weights.
    store: PathBuf,
    /// Certificates, announcement and list of senders.
    shared: PathBuf,
    address: String,
    bytes: u64,
    /// Send rate in bytes per second; 0: no limit.
    rate: u64,
}

impl Part {
    fn json(&self) -> String {
        let Self { is_sender, store, shared, address, bytes, rate } = self;
        json!([is_sender, store, shared, address, bytes, rate]).to_string()
    }

    fn read(text: &str) -> Result<Self> {
        let (is_sender, store, shared, address, bytes, rate) = serde_json::from_str(text)?;
        Ok(Self { is_sender, store, shared, address, bytes, rate })
    }

    fn play(&self) -> Result<()> {
        let store = HostStore::open_in(RUN, std::slice::from_ref(&self.store))?;
        if self.is_sender { self.send(&store) } else { self.receive(store) }
    }

    /// Publishes the version, or takes it over from a sender of this host that was killed; serves it until it is killed.
    fn send(&self, store: &HostStore) -> Result<()> {
        let (id, file) = (VersionId::new(VERSION.0, VERSION.1), self.shared.join("announcement"));
        let known = if file.exists() { Some(announced(&file)?) } else { None };
        let before = known.map(|known| store.find(&known.description)).transpose()?.flatten();
        let whole = match before {
            Some(whole) => whole,
            None => store.publish(id, WeightKind::Bfloat16, &content(self.bytes))?,
        };
        let announcement =
            Announcement { description: whole.description().clone(), address: String::new(), probe: None };
        fs::write(&file, v1::WeightsRef::from(&announcement).encode_to_vec())?;
        let shelf = Shelf::default();
        shelf.put(&whole);
        let security = launch::security(&self.shared.join("certs"), PeerRole::Learner)?;
        let options = ServerOptions { rate: (self.rate > 0).then_some(self.rate), ..ServerOptions::new(security, RUN) };
        let server = DataServer::start(&format!("{}:0", self.address), shelf, options)?;
        println!("{}", server.address());
        loop {
            std::thread::park();
        }
    }

    /// Brings the version to this host, from whichever senders are listed at the moment.
    fn receive(&self, store: HostStore) -> Result<()> {
        let announcement = announced(&self.shared.join("announcement"))?;
        let security = launch::security(&self.shared.join("certs"), PeerRole::Rollout)?;
        let receiver = Receiver::new(Arc::new(store), Shelf::default(), FetchOptions::new(security, RUN));
        let finder = |failed: &[String]| -> Result<Vec<Source>, String> {
            let listed = fs::read_to_string(self.shared.join("senders")).map_err(|error| error.to_string())?;
            let all: Vec<Source> =
                listed.lines().map(|address| Source { address: address.to_owned(), role: PeerRole::Learner }).collect();
            let good: Vec<Source> = all.iter().filter(|source| !failed.contains(&source.address)).cloned().collect();
            Ok(if good.is_empty() { all } else { good })
        };
        let began = Instant::now();
        let received = receiver.receive(&announcement, &finder, &AtomicBool::new(false))?;
        let (seconds, fetched) = (began.elapsed().as_secs_f64(), received.fetched);
        println!(
            "{}",
            json!({"seconds": seconds, "fetched_bytes": fetched.bytes, "resumed_pieces": fetched.resumed_pieces,
                "wrong_pieces": fetched.wrong_pieces, "pieces": announcement.description.pieces()})
        );
        Ok(())
    }
}

fn announced(file: &Path) -> Result<Announcement> {
    Ok(Announcement::try_from(&v1::WeightsRef::decode(&fs::read(file)?[..])?)?)
}

/// Bytes that do not repeat, the same for every sender.
fn content(bytes: u64) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    for (number, word) in (0..).zip(content.chunks_mut(8)) {
        word.copy_from_slice(&mix(number).to_le_bytes()[..word.len()]);
    }
    content
}

fn main() -> Result<()> {
    if let Ok(part) = std::env::var(PART) {
        return Part::read(&part)?.play();
    }
    let arguments = Arguments::parse();
    ensure!(arguments.gigabytes > 0.0 && arguments.rate > 0, "the size and the rate must be above 0");
    let Some(hosts) = hosts(3)? else { return Ok(()) };
    for what in ["nothing", "sender, another one continues", "sender, started again", "receiver, started again", "bits"]
    {
        let bench = Bench::new(&arguments, &hosts)?;
        println!("{}", bench.case(what)?);
    }
    Ok(())
}

/// One transfer: two hosts that can send, and one that receives.
struct Bench<'a> {
    arguments: &'a Arguments,
    hosts: &'a [Host],
    shared: tempfile::TempDir,
    stores: tempfile::TempDir,
}

/// A process of the benchmark; killed when it is dropped.
struct Process(Child);

impl Process {
    fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// The next line that it prints.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().context("its output")?).read_line(&mut line)?;
        ensure!(!line.is_empty(), "it has ended without a word");
        Ok(line.trim().to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

impl<'a> Bench<'a> {
    fn new(arguments: &'a Arguments, hosts: &'a [Host]) -> Result<Self> {
        let (shared, stores) = (tempfile::tempdir()?, tempfile::tempdir_in(&arguments.folder)?);
        let certificates = shared.path().join("certs");
        let made = Command::new(program("pacs")?).arg("certs").arg(&certificates).stdout(Stdio::null()).status()?;
        ensure!(made.success(), "pacs certs: {made}");
        Ok(Self { arguments, hosts, shared, stores })
    }

    fn bytes(&self) -> u64 {
        (self.arguments.gigabytes * 1e9) as u64 / 2 * 2
    }

    fn start(&self, host: usize, is_sender: bool, rate: u64) -> Result<Process> {
        let store = self.stores.path().join(format!("host{host}"));
        fs::create_dir_all(&store)?;
        let part = Part {
            is_sender,
            store,
            shared: self.shared.path().to_owned(),
            address: self.hosts[host].address.clone(),
            bytes: self.bytes(),
            rate: rate * 1_000_000,
        };
        let mut command = self.hosts[host].within(&Command::new(std::env::current_exe()?));
        command.env(PART, part.json()).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Process(command.spawn().context("start a process on a host")?))
    }

    fn list(&self, senders: &[&str]) -> Result<()> {
        let (part, list) = (self.shared.path().join("senders.part"), self.shared.path().join("senders"));
        fs::write(&part, senders.join("\n"))?;
        Ok(fs::rename(part, list)?)
    }

    /// Waits until this share of the model has come to the receiver's host.
    fn wait_for(&self, before: u64, share: f64) -> Result<()> {
        let began = Instant::now();
        while ((self.hosts[1].link_bytes()?.0 - before) as f64) < share * self.bytes() as f64 {
            ensure!(began.elapsed() < DEADLINE, "nothing comes");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Flips a bit in every eighth of what a sender holds, so that some of them are in pieces that it is asked for.
    fn flip(&self, host: usize) -> Result<()> {
        let mut folders = vec![self.stores.path().join(format!("host{host}"))];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.metadata()?.len() >= self.bytes() {
                    let file = File::options().read(true).write(true).open(&path)?;
                    for eighth in 0..8 {
                        let (mut byte, at) = ([0], self.bytes() / 8 * eighth);
                        file.read_exact_at(&mut byte, at)?;
                        file.write_all_at(&[byte[0] ^ 1], at)?;
                    }
                    return Ok(());
                }
            }
        }
        bail!("the version of host {host} is not there")
    }

    fn case(&self, killed: &str) -> Result<Value> {
        let rate = if killed == "nothing" { 0 } else { self.arguments.rate };
        let mut first = self.start(0, true, rate)?;
        let first_address = first.line()?;
        let has_second = matches!(killed, "sender, another one continues" | "bits");
        let second = if has_second { Some(self.start(2, true, rate)?) } else { None };
        let second = second.map(|mut process| process.line().map(|address| (process, address))).transpose()?;
        let mut senders = vec![first_address.as_str()];
        senders.extend(second.as_ref().map(|(_, address)| address.as_str()));
        self.list(&senders)?;
        if killed == "bits" {
            self.flip(0)?;
        }
        let (before, began) = (self.hosts[1].link_bytes()?.0, Instant::now());
        let mut receiver = self.start(1, false, 0)?;
        let (mut again, mut address) = (None, String::new());
        if killed.starts_with("sender") || killed.starts_with("receiver") {
            self.wait_for(before, 0.5)?;
        }
        match killed {
            "sender, another one continues" => first.kill(),
            "sender, started again" => {
                first.kill();
                let mut process = self.start(0, true, rate)?;
                address.push_str(&process.line()?);
                self.list(&[&address])?;
                again = Some(process);
            }
            "receiver, started again" => {
                receiver.kill();
                receiver = self.start(1, false, 0)?;
                again = Some(first);
            }
            _ => again = Some(first),
        }
        let received: Value = serde_json::from_str(&receiver.line().context("hear of the receiver")?)?;
        let (seconds, came) = (began.elapsed().as_secs_f64(), self.hosts[1].link_bytes()?.0 - before);
        drop((again, second));
        ensure!(killed != "bits" || received["wrong_pieces"].as_u64() >= Some(1), "no flipped bit was found");
        Ok(json!({"bench": "transfer", "hit": killed, "bytes": self.bytes(), "tls": true,
            "sender_megabytes_per_second": if rate > 0 { Some(rate) } else { None }, "seconds": seconds,
            "link_bytes": came, "times_the_model": came as f64 / self.bytes() as f64, "last_receiver": received}))
    }
}
