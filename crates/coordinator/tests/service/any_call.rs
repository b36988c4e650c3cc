//! Every call of workers and operators with any content, against the real machine, driver and journal: nothing panics, and whatever was called,
//! the next coordinator resumes from the journal and honest workers finish the run.
//!
//! `PACS_SEEDS` and `PACS_FIRST_SEED` say how much is tried; a failure names its seed.

use std::time::Duration;

use crate::calls::{Any, Known, call};
use crate::support::{Fleet, Job, end_of};
use crate::{mutate, run_folder};
use pacs_coordinator::RunEnd;
use pacs_protocol::v1;
use pacs_protocol::v1::operate_request::Command;
use pacs_protocol::v1::operator_service_server::OperatorService;
use pacs_types::mix;
use tonic::Request;

const SEEDS: u64 = 4;
const CALLS: usize = 2000;
/// No call may take longer.
const DEADLINE: Duration = Duration::from_secs(20);

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_content_of_a_call_keeps_honest_workers_from_finishing_the_run() {
    let (first, count) = (setting("PACS_FIRST_SEED").unwrap_or(0), setting("PACS_SEEDS").unwrap_or(SEEDS));
    for seed in first..first + count {
        eprintln!("seed {seed}");
        let job = Job::new();
        let coordinator = job.start(2, "").await.unwrap();
        let services = coordinator.services();
        let (mut any, mut known) = (Any::Seed(mix(seed)), Known::default());
        for _ in 0..CALLS {
            tokio::time::timeout(DEADLINE, call(&services, &mut any, &mut known)).await.expect("an answer in time");
        }
        drop(services);
        drop(coordinator);
        // It may have been told that the run has failed: another start resumes it all the same.
        let coordinator = job.start(2, "").await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        // Or be paused, which a restart does not change.
        let command = Some(Command::Resume(v1::Resume {}));
        let resume = v1::OperateRequest { operator: "honest".into(), command };
        drop(coordinator.services().operate(Request::new(resume)).await);
        let fleet = Fleet::start(coordinator.address(), None);
        let end = end_of(coordinator).await;
        assert!(matches!(end, RunEnd::Finished { step: 2, .. }), "seed {seed}: {end:?}");
        fleet.join().await;
        assert_eq!(job.steps_in("metrics.jsonl"), [1, 2], "seed {seed}");
    }
}

/// The inputs of `tests/fuzz`, a bounded number of them.
#[test]
fn any_damage_to_a_run_folder_is_mended_or_refused() {
    mutate::each(&run_folder::examples(), 40, run_folder::check);
}
