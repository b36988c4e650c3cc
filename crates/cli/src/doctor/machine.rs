//! Checks of the system: limits, shared memory, debugging variables.

use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::{Finding, Needs, gib};

/// Open-file limit that a coordinator of a large run, or a pool of verifier processes, may need.
const ENOUGH_FILES: u64 = 4096;

/// Debugging variables that slow programs down or flood logs when left set, with their effect.
const DEBUGGING: [(&str, &str); 9] = [
    ("CUDA_LAUNCH_BLOCKING", "every kernel waits for the one before"),
    ("NCCL_DEBUG", "every rank writes a log of its own"),
    ("NCCL_ALGO", "NCCL no longer chooses its algorithm"),
    ("NCCL_PROTO", "NCCL no longer chooses its protocol"),
    ("NCCL_P2P_DISABLE", "GPUs of a node talk through memory"),
    ("NCCL_SHM_DISABLE", "GPUs of a node talk through the network"),
    ("NCCL_IB_DISABLE", "nodes talk over sockets"),
    ("OMP_NUM_THREADS", "libtorch may use fewer threads than configured"),
    ("LD_PRELOAD", "a library is put in front of all others"),
];

pub(super) fn look(needs: Needs) -> Vec<Finding> {
    vec![open_files(), shared_memory(needs), debugging(|name| std::env::var(name).ok())]
}

fn open_files() -> Finding {
    const CHECK: &str = "open files";
    let limit = fs::read_to_string("/proc/self/limits").ok().and_then(|limits| soft_limit(&limits, "Max open files"));
    match limit {
        Some(limit) if limit >= ENOUGH_FILES => Finding::ok(CHECK, format!("up to {limit}")),
        Some(limit) => Finding::warning(
            CHECK,
            format!("up to {limit}"),
            format!("raise the limit of the service or shell that starts it to {ENOUGH_FILES} (`ulimit -n`)"),
        ),
        None => Finding::warning(CHECK, "the limit cannot be read", "see `ulimit -n`"),
    }
}

/// Parses the soft limit `name` from the text of `/proc/self/limits`; unlimited is `u64::MAX`.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let rest = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match rest.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

fn shared_memory(needs: Needs) -> Finding {
    const CHECK: &str = "shared memory";
    let advice = |wanted: u64| {
        format!("give it {}: a volume `medium: Memory` on Kubernetes, `--shm-size` for a container", gib(wanted))
    };
    let path = Path::new("/dev/shm");
    let Ok(size) = statvfs(path) else {
        return Finding::warning(CHECK, "there is no /dev/shm", "weights are published in the temporary folder");
    };
    let free = size.blocks_available() * size.fragment_size();
    match needs.published_bytes() {
        Some(wanted) if free < wanted => {
            let found = format!("{} free, and three versions of the weights take {}", gib(free), gib(wanted));
            Finding::failure(CHECK, found, advice(wanted))
        }
        // 64 MiB is the default of containers.
        None if free <= 64 << 20 => Finding::warning(CHECK, format!("{} free", gib(free)), advice(1 << 30)),
        _ => Finding::ok(CHECK, format!("{} free", gib(free))),
    }
}

fn debugging(variable: impl Fn(&str) -> Option<String>) -> Finding {
    const CHECK: &str = "environment";
    let set: Vec<String> = DEBUGGING
        .iter()
        .filter(|(name, _)| variable(name).is_some_and(|value| !value.is_empty() && value != "WARN"))
        .map(|(name, effect)| format!("{name} ({effect})"))
        .collect();
    match set.is_empty() {
        true => Finding::ok(CHECK, "no debugging variables are set"),
        false => Finding::warning(CHECK, set.join(", "), "unset what is not wanted for good"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn limits_are_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max processes             unlimited            unlimited            processes\n\
                    Max open files            1024                 1048576              files\n";
        assert_eq!(soft_limit(text, "Max open files"), Some(1024));
        assert_eq!(soft_limit(text, "Max processes"), Some(u64::MAX));
        assert_eq!(soft_limit(text, "Max file size"), None);
    }

    #[test]
    fn leftovers_are_named_with_their_effect() {
        let set = |name: &str| match name {
            "NCCL_DEBUG" => Some("WARN".to_owned()),
            "NCCL_ALGO" => Some("Ring".to_owned()),
            _ => None,
        };
        let finding = debugging(set);
        assert_eq!(finding.level, Level::Warning);
        assert_eq!(finding.found, "NCCL_ALGO (NCCL no longer chooses its algorithm)");
        assert_eq!(debugging(|_| None).level, Level::Ok);
    }

    #[test]
    fn a_model_that_does_not_fit_in_shared_memory_is_a_failure() {
        let needs = Needs { parameters: Some(u64::MAX / 100), ..Needs::default() };
        assert_eq!(shared_memory(needs).level, Level::Failure);
    }
}
