//! Ranks that are processes of their own: killed, stopped, and back from the dead.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pacs_collective::{Collective, GroupConfig, HostCollective, HostListener};
use pacs_types::Generation;

/// Set in a rank's process: its rank.
const RANK: &str = "PACS_TEST_RANK";
/// Long enough that only a hang reaches it.
const PATIENT: Duration = Duration::from_secs(60);
/// The deadline of operations where a test waits for it.
const SHORT: Duration = Duration::from_millis(1500);

/// Not a test: what the rank processes run.
#[test]
fn rank_process() {
    let Ok(rank) = std::env::var(RANK) else { return };
    let rank: usize = rank.parse().unwrap();
    let listener = HostListener::bind("127.0.0.1:0").unwrap();
    println!("\naddress {}", listener.address());
    // Each line is a generation: its number, its deadline, its addresses.
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ').map(str::to_owned);
        let generation = Generation(words.next().unwrap().parse().unwrap());
        let timeout = Duration::from_millis(words.next().unwrap().parse().unwrap());
        let rank = words.next().unwrap().parse().unwrap_or(rank);
        let group = GroupConfig { job: "a".into(), generation, rank, addresses: words.collect(), timeout };
        match HostCollective::connect(&listener, group) {
            Ok(ring) => println!("{}", work(ring)),
            Err(error) => println!("error {error}"),
        }
    }
}

/// Adds up until something fails.
fn work(mut ring: HostCollective) -> String {
    for step in 0.. {
        let mut data = vec![1.0; 200_000];
        if let Err(error) = ring.all_reduce_sum(&mut data) {
            return format!("error {error}");
        }
        assert!(data.iter().all(|sum| *sum == ring.world_size() as f32));
        if step == 3 {
            println!("works");
        }
    }
    unreachable!("steps do not run out")
}

#[test]
fn a_killed_rank_fails_the_others_at_once() {
    let mut ranks = start(3);
    form(&mut ranks, 1, PATIENT);
    ranks.iter_mut().for_each(|rank| drop(rank.expect("works")));
    let killed = Instant::now();
    ranks[1].signal(Signal::SIGKILL);
    for rank in [0, 2] {
        let error = ranks[rank].expect("error");
        assert!(error.contains("the peer closed the connection"), "{error}");
    }
    assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    // The remaining ranks continue in the next generation.
    let [first, last] = [0, 2].map(|rank| ranks[rank].address.clone());
    for (new_rank, rank) in [0, 2].into_iter().enumerate() {
        ranks[rank].send(&format!("2 {} {new_rank} {first} {last}", PATIENT.as_millis()));
    }
    ranks[0].expect("works");
    ranks[2].expect("works");
}

#[test]
fn a_suspended_rank_fails_the_others_at_the_deadline_and_is_refused_afterwards() {
    let mut ranks = start(3);
    form(&mut ranks, 1, SHORT);
    ranks.iter_mut().for_each(|rank| drop(rank.expect("works")));
    let stopped = Instant::now();
    ranks[1].signal(Signal::SIGSTOP);
    let errors = [0, 2].map(|rank| ranks[rank].expect("error"));
    assert!(errors.iter().any(|error| error.contains("not done within")), "{errors:?}");
    assert!(stopped.elapsed() >= SHORT / 2 && stopped.elapsed() < Duration::from_secs(20), "{:?}", stopped.elapsed());
    // The others form the next generation without it.
    let addresses: Vec<String> = ranks.iter().map(|rank| rank.address.clone()).collect();
    for (new_rank, rank) in [0, 2].into_iter().enumerate() {
        ranks[rank].send(&format!("2 {} {new_rank} {} {}", PATIENT.as_millis(), addresses[0], addresses[2]));
    }
    ranks[0].expect("works");
    ranks[2].expect("works");
    // It resumes: the old communicator is gone, and the old generation does not admit it again.
    ranks[1].signal(Signal::SIGCONT);
    ranks[1].expect("error");
    ranks[1].send(&format!("1 {} 1 {}", SHORT.as_millis(), addresses.join(" ")));
    let refused = ranks[1].expect("error");
    assert!(refused.contains("connect on rank 1"), "{refused}");
    // The others have not even noticed: they still add up, and then lose a member for real.
    ranks[2].signal(Signal::SIGKILL);
    assert!(ranks[0].expect("error").contains("closed"));
}

#[test]
fn a_rank_of_an_older_generation_is_refused_while_the_new_one_forms() {
    let mut ranks = start(2);
    let addresses = format!("{} {}", ranks[0].address, ranks[1].address);
    ranks[0].send(&format!("5 {} 0 {addresses}", PATIENT.as_millis()));
    ranks[1].send(&format!("4 {} 1 {addresses}", PATIENT.as_millis()));
    let refused = ranks[1].expect("error");
    assert!(refused.contains("of gen-5 of job `a`, not rank 1 of 2 of gen-4"), "{refused}");
    ranks[1].send(&format!("5 {} 1 {addresses}", PATIENT.as_millis()));
    ranks.iter_mut().for_each(|rank| rank.expect_only("works"));
}

/// A rank's process, killed when dropped.
struct Rank {
    process: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    address: String,
}

fn start(world_size: usize) -> Vec<Rank> {
    (0..world_size).map(Rank::start).collect()
}

fn form(ranks: &mut [Rank], generation: u64, timeout: Duration) {
    let addresses: Vec<String> = ranks.iter().map(|rank| rank.address.clone()).collect();
    for (number, rank) in ranks.iter_mut().enumerate() {
        rank.send(&format!("{generation} {} {number} {}", timeout.as_millis(), addresses.join(" ")));
    }
}

impl Rank {
    fn start(rank: usize) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["rank_process", "--exact", "--nocapture", "--test-threads=1"])
            .env(RANK, rank.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let input = process.stdin.take().unwrap();
        let mut rank = Self { process, input, lines, address: String::new() };
        rank.address = rank.expect("address").trim_start_matches("address ").to_owned();
        rank
    }

    fn send(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
    }

    /// The next line that begins with `word`.
    fn expect(&mut self, word: &str) -> String {
        let deadline = Instant::now() + PATIENT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|error| panic!("no `{word}`: {error}"));
            if line.starts_with(word) {
                return line;
            }
        }
    }

    fn expect_only(&mut self, word: &str) {
        let line = self.lines.recv_timeout(PATIENT).unwrap();
        assert!(line.starts_with(word), "{line}");
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
