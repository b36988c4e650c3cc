//! `pacs-worker devices`: what this machine has of a GPU's parts.

use anyhow::Result;
use clap::Args;
use pacs_runtime::Exit;
use pacs_torch::{GpuParts, GpuReport, gpu_report};
use serde_json::{Value, json};

use crate::Failure;

/// What `--device cuda` needs on this machine, found in the way that a worker finds it.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 0 when a worker could compute on a GPU, 78 when a part is missing.

Examples:
  pacs-worker devices
  CUDA_VISIBLE_DEVICES=3 pacs-worker devices --json")]
pub(crate) struct Arguments {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let report = gpu_report();
    match arguments.json {
        true => println!("{}", json(&report)),
        false => print!("{}", text(&report)),
    }
    let parts = [report.library.is_ok(), report.first.is_some(), report.kernels.is_ok(), report.graphs.is_ok()];
    Ok(if parts.contains(&false) { Exit::Config } else { Exit::Done })
}

fn json(report: &GpuReport) -> Value {
    let part = |part: &Result<(), String>| part.as_ref().err().cloned();
    json!({
        "libtorch_cuda": report.library.as_ref().ok(),
        "problem": report.library.as_ref().err(),
        "visible": report.visible,
        "compute_capability": report.first.as_ref().map(|GpuParts { capability: [major, minor], .. }| format!("{major}.{minor}")),
        "free_bytes": report.first.as_ref().map(|first| first.memory.0),
        "total_bytes": report.first.as_ref().map(|first| first.memory.1),
        "kernels_problem": part(&report.kernels),
        "graphs_problem": part(&report.graphs),
    })
}

fn text(report: &GpuReport) -> String {
    let said = |part: &Result<(), String>| part.as_ref().err().map_or("ok", String::as_str).to_owned();
    let first = report.first.as_ref().map_or_else(
        || "none".to_owned(),
        |GpuParts { capability: [major, minor], memory: (free, total) }| {
            format!("compute capability {major}.{minor}, {} of {} MiB free", free >> 20, total >> 20)
        },
    );
    let library = report.library.as_ref().unwrap_or_else(|problem| problem);
    [
        ("libtorch", library.clone()),
        ("GPUs", report.visible.to_string()),
        ("first", first),
        ("kernels", said(&report.kernels)),
        ("graphs", said(&report.graphs)),
    ]
    .map(|(name, value)| format!("{name:<10}{value}\n"))
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_words_and_as_json() {
        let whole = GpuReport {
            library: Ok("/t/libtorch_cuda.so".to_owned()),
            visible: 2,
            first: Some(GpuParts { capability: [9, 0], memory: (70 << 30, 80 << 30) }),
            kernels: Ok(()),
            graphs: Ok(()),
        };
        let said = "libtorch  /t/libtorch_cuda.so\nGPUs      2\n\
                    first     compute capability 9.0, 71680 of 81920 MiB free\nkernels   ok\ngraphs    ok\n";
        assert_eq!(text(&whole), said);
        let broken = GpuReport { kernels: Err("NVRTC cannot be opened".to_owned()), first: None, ..whole };
        assert!(text(&broken).contains("first     none\nkernels   NVRTC cannot be opened\n"));
        let json = json(&broken);
        assert_eq!((&json["kernels_problem"], &json["visible"]), (&json!("NVRTC cannot be opened"), &json!(2)));
        assert_eq!((&json["problem"], &json["total_bytes"]), (&Value::Null, &Value::Null));
    }
}
