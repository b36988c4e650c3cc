//! `cargo xtask bench coordinator` and `cargo xtask bench asynchrony`: prints one JSON line a measurement.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use pacs_coordinator::measure::{Load, Overlap, held, step_time, throughput};
use serde_json::json;
use tokio::runtime::Runtime;

/// A step takes so many times less with `max_lag` = 1 than with 0 where generation and training cost the same.
const RATIO_TARGET: f64 = 1.7;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().context("name the measurement: coordinator or asynchrony")?;
    let seconds: f64 = arguments.next().map_or(Ok(10.0), |text| text.parse()).context("read the seconds")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    match what.as_str() {
        "coordinator" => coordinator(&runtime, &model, seconds),
        "in-flight" => in_flight(&runtime, &model, &mut arguments),
        "asynchrony" => asynchrony(&runtime, &model, seconds),
        other => Err(anyhow!("there is no measurement `{other}`")),
    }
}

fn coordinator(runtime: &Runtime, model: &Path, seconds: f64) -> Result<()> {
    for (sample_bytes, samples_per_step, target) in [(2048, 8000, 20_000.0), (65_536, 800, 2000.0)] {
        let folder = tempfile::tempdir()?;
        // As many steps as the target would make in that time.
        let steps = (target * seconds / f64::from(samples_per_step)).ceil().max(1.0) as u64;
        let load = load(folder.path(), model, sample_bytes, samples_per_step, steps);
        let measured = runtime.block_on(throughput(&load)).map_err(|problem| anyhow!(problem))?;
        let (elapsed, cpu) = (measured.elapsed.as_secs_f64(), measured.cpu.as_secs_f64());
        let samples = measured.samples as f64;
        let line = json!({
            "bench": "coordinator", "what": "throughput", "sample_bytes": sample_bytes, "samples": measured.samples,
            "seconds": elapsed, "samples_per_second": samples / elapsed, "target": target,
            // The workers that make the samples up are part of it.
            "cpu_seconds": cpu, "cpu_microseconds_per_sample": 1e6 * cpu / samples,
            "samples_per_second_of_two_free_cores": 2.0 * samples / cpu,
        });
        println!("{line}");
    }
    for (sample_bytes, samples) in [("2048", "100000"), ("65536", "4000")] {
        // In a process of its own: memory that was used before and is free again would hide what this takes.
        let program = std::env::current_exe().context("find this program")?;
        let arguments = ["in-flight", "0", sample_bytes, samples];
        let status = Command::new(program).args(arguments).status().context("start another process")?;
        anyhow::ensure!(status.success(), "the measurement of {samples} samples in flight ended with {status}");
    }
    Ok(())
}

/// Fills the slots, and starts the coordinator again: what `coordinator` does in a process of its own.
fn in_flight(runtime: &Runtime, model: &Path, arguments: &mut dyn Iterator<Item = String>) -> Result<()> {
    let mut number = |what| -> Result<u32> { arguments.next().context(what)?.parse().context(what) };
    let (sample_bytes, samples) = (number("bytes of a sample")?, number("samples")?);
    let folder = tempfile::tempdir()?;
    let load = load(folder.path(), model, sample_bytes as usize, samples / 2, 2);
    let held = runtime.block_on(held(&load)).map_err(|problem| anyhow!(problem))?;
    let line = json!({
        "bench": "coordinator", "what": "in flight", "sample_bytes": sample_bytes, "samples": held.samples,
        "bytes": held.bytes, "resident_bytes": held.resident_bytes,
        "resident_share": held.resident_bytes as f64 / held.bytes as f64, "resident_share_target": 1.3,
        "restart_seconds": held.restart.as_secs_f64(), "restart_cpu_seconds": held.restart_cpu.as_secs_f64(),
        "restart_target": 5,
    });
    println!("{line}");
    Ok(())
}

/// The workers wait instead of computing: what is measured is what the coordinator lets overlap.
fn asynchrony(runtime: &Runtime, model: &Path, seconds: f64) -> Result<()> {
    const STEPS: u64 = 12;
    // The synchronous loop takes two thirds of the time, for a step of it is generation and training.
    let work = Duration::from_secs_f64(seconds / (3.0 * STEPS as f64));
    let mut measured = Vec::new();
    for max_lag in [0, 1] {
        let folder = tempfile::tempdir()?;
        let overlap =
            Overlap { folder: folder.path().to_owned(), model: model.to_owned(), max_lag, work, steps: STEPS };
        let step = runtime.block_on(step_time(&overlap)).map_err(|problem| anyhow!(problem))?.as_secs_f64();
        let line = json!({
            "bench": "asynchrony", "max_lag": max_lag, "steps": STEPS, "generation_seconds": work.as_secs_f64(),
            "training_seconds": work.as_secs_f64(), "step_seconds": step,
        });
        println!("{line}");
        measured.push(step);
    }
    let ratio = measured[0] / measured[1];
    println!("{}", json!({"bench": "asynchrony", "ratio_of_step_times": ratio, "target": RATIO_TARGET}));
    Ok(())
}

fn load(folder: &Path, model: &Path, sample_bytes: usize, samples_per_step: u32, steps: u64) -> Load {
    Load { folder: folder.to_owned(), model: PathBuf::from(model), sample_bytes, samples_per_step, steps, max_lag: 1 }
}
