//! Seeded simulation of the machine in a faulty world: workers, operators, a network that delays, drops, repeats and
//! reorders messages, a disk that loses unsynced writes, and processes of every role, including the coordinator, that
//! die at any moment. A reference that knows only what was promised to others checks every event.
//!
//! A failure names its seed, and `PACS_FIRST_SEED=<seed> PACS_SEEDS=1 cargo test -p pacs-machine --test simulation`, or
//! `cargo xtask sim --first-seed <seed> --seeds 1`, replays it exactly.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod actor;
mod leases;
mod promises;
mod reference;
mod server;
mod world;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use world::World;

const SEEDS: u64 = 1000;

/// Seeds that have found a bug in the machine, with a description. They always run.
const FOUND_BUGS: [(u64, &str); 8] = [
    (302, "a peer lost in the save of the last step ended the run as a full disk would"),
    (557, "the same"),
    (711, "the same in the save of a stop"),
    (735, "the same"),
    (123, "a stop at once lost the groups of the batch in training"),
    (1912, "a stop at once forgot the checkpoint that was being committed"),
    (1305, "several consequences of one event ended the run several times"),
    (13753, "a rank that could not write again took back what it had written, although it was being committed"),
];

#[test]
fn runs_finish_and_never_break_an_invariant() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (first, count) = (number("PACS_FIRST_SEED").unwrap_or(0), number("PACS_SEEDS").unwrap_or(SEEDS));
    let seen = simulate((first..first + count).collect());
    // Faults that never happen test nothing. A small number of seeds need not have them all.
    if count < SEEDS {
        return;
    }
    for name in [
        "coordinator_crashes",
        "coordinator_crashes_with_unsynced_records",
        "coordinator_crashes_between_checkpoints",
        "journals_lost",
        "repeated_requests",
        "lost_messages",
        "lapsed_leases",
        "lost_generations",
        "lost_samples",
        "failed_verdicts",
        "replaced_samples",
        "dropped_groups",
        "set_aside_groups",
        "deadly_samples",
        "stuck_workers",
        "stalls",
        "uniform_groups_left_out",
        "evicted_groups",
        "overdue_groups",
        "stale_submissions",
        "stops",
        "drains",
        "ending_workers",
        "left_before_their_grace_was_over",
        "graces_that_were_over",
        "trained_at_full_lag",
        "stale_generations_refused",
        "full_disks_at_the_end",
        "failed_checkpoints",
        "committed_behind_the_newest_step",
        "generations_with_fewer",
        "generations_with_more",
        "skipped_draws",
        "reopened_problems",
        "twins",
        "two_with_one_name",
        "frozen_processes",
        "half_dead_told_to_leave",
        "names_taken_over",
        "registered_twice",
        "mass_preemptions",
        "mass_losses",
        "searches",
        "searches_without_a_trace",
        "steps_trained_during_an_evaluation",
        "steps_held_for_an_evaluation",
        "evaluations_abandoned",
        "evaluations_that_outlive_a_generation",
    ] {
        assert!(seen.get(name).is_some_and(|count| *count > 0), "{name} never happened: {seen:#?}");
    }
}

/// The same for jobs that only evaluate: they have no checkpoint to return to, and every sample has to be kept.
#[test]
fn evaluations_finish_and_lose_no_sample() {
    let seen = simulate_with((0..200).collect(), World::measuring);
    for name in ["coordinator_crashes", "lost_samples", "failed_verdicts", "stops", "lapsed_leases", "drains"] {
        assert!(seen.get(name).is_some_and(|count| *count > 0), "{name} never happened: {seen:#?}");
    }
}

#[test]
fn seeds_that_found_bugs_stay_fixed() {
    simulate(FOUND_BUGS.map(|(seed, _)| seed).to_vec());
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    for seed in [3, 14] {
        assert_eq!(World::new(seed).run(), World::new(seed).run());
    }
}

/// Runs the seeds on all cores; returns how often each kind of event happened.
fn simulate(seeds: Vec<u64>) -> BTreeMap<String, u64> {
    simulate_with(seeds, World::new)
}

fn simulate_with(seeds: Vec<u64>, world: fn(u64) -> World) -> BTreeMap<String, u64> {
    let seen = Mutex::new(BTreeMap::new());
    let failed = Mutex::new(Vec::new());
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    match std::panic::catch_unwind(|| world(*seed).run()) {
                        Ok(counters) => {
                            let mut seen = seen.lock().unwrap();
                            for (name, count) in counters {
                                *seen.entry(name).or_insert(0) += count;
                            }
                        }
                        Err(panic) => failed.lock().unwrap().push((*seed, reason(panic.as_ref()))),
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort_unstable();
    for (seed, why) in &failed {
        println!("seed {seed} failed: {why}");
    }
    let seeds: Vec<u64> = failed.iter().map(|(seed, _)| *seed).collect();
    assert!(
        seeds.is_empty(),
        "{} seeds failed: {seeds:?}; replay one with PACS_SEEDS=1 PACS_FIRST_SEED={}",
        seeds.len(),
        seeds[0]
    );
    seen.into_inner().unwrap()
}

/// First line of a panic's message.
fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("a panic without words").to_owned()
}
