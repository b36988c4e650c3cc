//! Short programs a second: in the sandbox, without one layer each, and by a plain process of Python.
//!
//! ```sh
//! cargo bench -p pacs-sandbox --bench programs            # 2 at once, 5 seconds each
//! cargo bench -p pacs-sandbox --bench programs -- 4 10    # 4 at once, 10 seconds each
//! ```
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pacs_sandbox::{Case, Entry, Job, Layer, Limits, Policy, Sandbox, SandboxError};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const PROGRAM: &str = "a, b = map(int, input().split())\nprint(a + b)\n";
const INPUT: &str = "20 22\n";
const OUTPUT: &str = "42\n";

#[tokio::main]
async fn main() {
    // Cargo itself says `--bench`.
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse::<u64>().ok());
    let at_once = numbers.next().unwrap_or(2);
    let time = Duration::from_secs(numbers.next().unwrap_or(5));
    println!("{at_once} at once, {} s each; a program adds two numbers of its input", time.as_secs());
    let report = |what: &str, programs: u64| {
        let rate = programs as f64 / time.as_secs_f64();
        println!("{what:<32} {rate:>7.1} programs/s {:>7.2} ms each on one", at_once as f64 / rate * 1e3);
    };
    report("python3, a plain process", plain(at_once, time, &["-c", PROGRAM]).await);
    report("python3 -I -S, a plain process", plain(at_once, time, &["-I", "-S", "-c", PROGRAM]).await);
    report("all layers", sandboxed(at_once, time, &[]).await.unwrap());
    let variants = Layer::ALL
        .into_iter()
        .filter(|layer| !matches!(layer, Layer::User | Layer::Cgroup))
        .map(|layer| (format!("without {layer}"), vec![layer]))
        .chain([("without any layer, forked".to_owned(), Layer::ALL.to_vec())]);
    for (what, without) in variants {
        match sandboxed(at_once, time, &without).await {
            Ok(programs) => report(&what, programs),
            // An interpreter in a home that other users may not enter is seen through the sandbox's own mounts alone.
            Err(error) => println!("{what:<32} not here: {error}"),
        }
    }
}

async fn plain(at_once: u64, time: Duration, arguments: &'static [&'static str]) -> u64 {
    let done = Arc::new(AtomicU64::new(0));
    let end = Instant::now() + time;
    let tasks = (0..at_once).map(|_| {
        let done = Arc::clone(&done);
        tokio::spawn(async move {
            while Instant::now() < end {
                let mut command = Command::new("python3");
                command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
                let mut process = command.spawn().unwrap();
                process.stdin.take().unwrap().write_all(INPUT.as_bytes()).await.unwrap();
                assert_eq!(process.wait_with_output().await.unwrap().stdout, OUTPUT.as_bytes());
                done.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    done.load(Ordering::Relaxed)
}

async fn sandboxed(at_once: u64, time: Duration, without: &[Layer]) -> Result<u64, SandboxError> {
    let policy = Policy { without: without.to_vec(), ..Policy::default() };
    let done = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..at_once {
        let entry = Entry::new(env!("CARGO_BIN_EXE_pacs-sandbox-init").into(), &[]);
        let mut sandbox = Sandbox::probe(&entry, &policy).await?;
        let done = Arc::clone(&done);
        tasks.push(async move {
            let job = Job::python(PROGRAM, Limits::default());
            let case = Case::Stdin { stdin: INPUT.to_owned() };
            let end = Instant::now() + time;
            while Instant::now() < end {
                let mut running = sandbox.begin(&job).await.unwrap();
                assert_eq!(running.run(&case).await.unwrap().stdout, OUTPUT);
                running.end().await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for task in tasks.into_iter().map(tokio::spawn).collect::<Vec<_>>() {
        task.await.unwrap();
    }
    Ok(done.load(Ordering::Relaxed))
}
