//! `pacs-worker bench collective` between real processes.

use std::process::{Command, Output};

use anyhow::{Context, Result};
use pacs_tests::program;
use serde_json::Value;

fn bench(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("pacs-worker")?);
    command.args(["bench", "collective"]).args(arguments).output().context("run pacs-worker bench collective")
}

#[test]
fn the_preflight_measures_every_operation_among_processes() -> Result<()> {
    let output = bench(&["--ranks", "3", "--seconds", "0.02", "--sizes", "1000,300000"])?;
    let (lines, table) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    assert!(output.status.success(), "{table}");
    let lines: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let (end, measured) = lines.split_last().context("lines")?;
    let operations = ["all_reduce_sum", "reduce_scatter_sum", "all_gather", "broadcast"];
    assert_eq!(measured.len(), 2 * operations.len());
    for (line, operation) in measured.iter().zip(operations.into_iter().flat_map(|name| [name, name])) {
        assert_eq!((line["operation"].as_str(), line["ranks"].as_u64()), (Some(operation), Some(3)), "{line}");
        assert!(line["bus_gigabytes_per_second"].as_f64().is_some_and(|bandwidth| bandwidth > 0.0), "{line}");
        assert_eq!(line["seconds_by_rank"].as_array().map(Vec::len), Some(3), "{line}");
        assert!(table.contains(operation), "{table}");
    }
    for probe in ["memory_seconds_by_rank", "link_seconds"] {
        let times = end[probe].as_array().with_context(|| format!("no {probe} in {end}"))?;
        assert!(times.len() == 3 && times.iter().all(|time| time.as_f64() > Some(0.0)), "{end}");
    }
    assert!(end["slow"].is_array(), "{end}");
    Ok(())
}

#[test]
fn ranks_that_are_started_one_by_one_find_each_other() -> Result<()> {
    // The port was free a moment ago; a loopback address of this test's own keeps other tests from taking it.
    let port = std::net::TcpListener::bind("127.0.0.4:0")?.local_addr()?.port();
    let address = format!("127.0.0.4:{port}");
    let common = ["--world", "2", "--address", &address, "--seconds", "0.02", "--sizes", "1000"];
    let rank = |rank: &'static str| bench(&[&["--rank", rank], &common[..]].concat());
    let (first, second) = std::thread::scope(|scope| {
        let second = scope.spawn(|| rank("1"));
        (rank("0"), second.join())
    });
    let (first, second) = (first?, second.map_err(|_| anyhow::anyhow!("the thread of rank 1 panicked"))??);
    for (output, lines) in [(&first, 5), (&second, 0)] {
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), lines, "only rank 0 speaks: {output:?}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_said_plainly() -> Result<()> {
    let output = bench(&["--ranks", "0"])?;
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let output = bench(&["--backend", "nccl", "--ranks", "1", "--seconds", "0.02", "--sizes", "1000"])?;
    let said = String::from_utf8(output.stderr)?;
    if output.status.success() {
        assert!(said.contains("over nccl, NCCL 2."), "{said}");
    } else {
        eprintln!("SKIPPED: the preflight over NCCL: {said}");
        assert!(said.contains("libcuda.so.1") || said.contains("libnccl.so.2") || said.contains("device"), "{said}");
    }
    Ok(())
}
