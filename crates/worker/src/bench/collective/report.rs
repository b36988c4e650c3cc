use pacs_collective::Collective;
use serde_json::{Value, json};

use super::measure::{Line, Probes};
use super::verdict::{Finding, judge};
use crate::bench::print;

/// Output of the measurements; only rank 0 prints.
pub(crate) struct Report {
    backend: &'static str,
    rank: usize,
    world_size: usize,
}

impl Report {
    pub(crate) fn new(backend: &'static str, collective: &dyn Collective) -> Self {
        let report = Self { backend, rank: collective.rank(), world_size: collective.world_size() };
        if report.rank == 0 {
            let versions = collective.device().and_then(|device| device.versions().ok());
            let versions = versions.map(|versions| format!(", {versions}")).unwrap_or_default();
            eprintln!("{} rank(s) over {backend}{versions}", report.world_size);
            eprintln!("{:>20} {:>12} {:>12} {:>14} {:>14}", "operation", "bytes", "ms", "GB/s of data", "GB/s of bus");
        }
        report
    }

    /// Prints one measurement, as soon as it is made.
    pub(crate) fn line(&self, line: &Line) {
        if self.rank != 0 {
            return;
        }
        let (seconds, data, bus) = self.numbers(line);
        let operation = line.work.operation().to_string();
        eprintln!("{operation:>20} {:>12} {:>12.3} {data:>14.3} {bus:>14.3}", line.bytes, seconds * 1e3);
        print(&json!({
            "bench": "collective", "backend": self.backend, "ranks": self.world_size, "operation": operation,
            "bytes": line.bytes, "repetitions": line.repetitions, "seconds": seconds,
            "data_gigabytes_per_second": data, "bus_gigabytes_per_second": bus, "seconds_by_rank": line.seconds,
        }));
    }

    /// Prints the probes and the verdict.
    pub(crate) fn end(&self, lines: &[Line], probes: &Probes) {
        if self.rank != 0 {
            return;
        }
        let findings = judge(&probes.memory, &probes.links);
        print(&json!({
            "bench": "collective", "backend": self.backend, "ranks": self.world_size,
            "memory_seconds_by_rank": probes.memory, "link_seconds": probes.links,
            "slow": findings.iter().map(finding).collect::<Vec<Value>>(),
        }));
        let best = lines.iter().map(|line| self.numbers(line).2).fold(0.0, f64::max);
        eprintln!("best bus bandwidth: {best:.3} GB/s");
        for finding in &findings {
            eprintln!("SLOW: {finding}");
        }
        if findings.is_empty() {
            eprintln!("no rank and no link stands out");
        }
    }

    /// Seconds per call, and bandwidth of the buffer and of the bus (GB/s).
    fn numbers(&self, line: &Line) -> (f64, f64, f64) {
        let seconds = line.longest();
        let data = line.bytes as f64 / seconds / 1e9;
        (seconds, data, data * line.work.bus_factor(self.world_size))
    }
}

fn finding(finding: &Finding) -> Value {
    let (kind, ranks, times_median) = match finding {
        Finding::Memory { rank, times_median } => ("memory", vec![*rank], times_median),
        Finding::Rank { rank, times_median } => ("rank", vec![*rank], times_median),
        Finding::Link { ranks, times_median } => ("link", ranks.to_vec(), times_median),
    };
    json!({"kind": kind, "ranks": ranks, "times_median": times_median})
}
