//! Workers that mean harm, or are broken in a way that comes to the same: what they do ends no run.

use crate::support::{Fleet, Job, end_of, until};
use pacs_coordinator::{Progress, RunEnd};
use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn saves_of_nothing_are_refused_and_the_good_checkpoint_stays() {
    let job = Job::new();
    let coordinator = job.start(6, "").await.unwrap();
    let mut events = coordinator.events();
    let fleet = Fleet::start(coordinator.address(), None);
    until(&mut events, |event| matches!(event, Progress::Saved { step: 2, .. })).await;
    fleet.seen.lock().unwrap().saves_nothing = true;
    let says = |event: &Progress, part: &str| matches!(event, Progress::Note { text } if text.contains(part));
    until(&mut events, |event| says(event, "could not be saved, the run continues without it")).await;
    let end = end_of(coordinator).await;
    fleet.join().await;
    let RunEnd::Failed { reason } = end else { panic!("the last checkpoint has to hold: {end:?}") };
    assert!(reason.contains("training-state") && reason.contains("hold 0 of"), "{reason}");
    let whole = job.run_dir().join("checkpoints/step-000002");
    assert!(whole.join("manifest.json").is_file() && whole.join("training-state-0-of-2.safetensors").is_file());

    // And the run resumes from it.
    let coordinator = job.start(6, "").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 6, .. }));
    fleet.join().await;
    assert_eq!(job.steps_in("metrics.jsonl"), (1..=6).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_training_fails_by_is_quarantined_and_listed_and_the_run_finishes() {
    const PILL: u64 = 2;
    let job = Job::new();
    let coordinator = job.start(4, "").await.unwrap();
    let mut events = coordinator.events();
    let fleet = Fleet::start(coordinator.address(), None);
    fleet.seen.lock().unwrap().pill = Some(PILL);
    until(&mut events, |event| matches!(event, Progress::Step(step) if step.step == 2)).await;
    let mut operator = OperatorServiceClient::connect(format!("http://{}", coordinator.address())).await.unwrap();
    let status = operator.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    let end = end_of(coordinator).await;
    assert!(matches!(end, RunEnd::Finished { step: 4, .. }), "{end:?}");
    let [quarantined] = &status.set_aside[..] else { panic!("{:?}", status.set_aside) };
    assert_eq!(quarantined.group_id, PILL);
    assert!(quarantined.reason.contains("training fails with it and not without it"), "{}", quarantined.reason);
    assert!(quarantined.reason.contains("cannot digest it"), "{}", quarantined.reason);
    {
        let seen = fleet.seen.lock().unwrap();
        // Each of the two ranks may fail by it.
        assert!((4..=12).contains(&seen.poisoned), "{} failures", seen.poisoned);
        let trained: Vec<u64> = seen.trained.values().flatten().map(|entry| entry.group_id).collect();
        assert!(!trained.contains(&PILL));
    }
    fleet.join().await;
    assert_eq!(job.steps_in("metrics.jsonl"), [1, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_does_not_forget_what_training_fails_by() {
    const PILL: u64 = 1;
    let job = Job::new();
    let mut starts = 0;
    loop {
        starts += 1;
        assert!(starts < 20, "the run does not end");
        let coordinator = job.start(3, "").await.unwrap();
        let mut events = coordinator.events();
        let fleet = Fleet::start(coordinator.address(), None);
        fleet.seen.lock().unwrap().pill = Some(PILL);
        let is_over = |event: &Progress| {
            // The first generations that are lost take the coordinator with them.
            let lost = matches!(event, Progress::Note { text } if text.contains("the run resumes from step"));
            (lost && starts <= 3) || matches!(event, Progress::Step(step) if step.step == 3)
        };
        until(&mut events, is_over).await;
        let mut operator = OperatorServiceClient::connect(format!("http://{}", coordinator.address())).await.unwrap();
        let status = operator.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
        if status.step < 3 {
            drop(coordinator);
            drop(fleet);
            continue;
        }
        assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 3, .. }));
        let listed: Vec<u64> = status.set_aside.iter().map(|group| group.group_id).collect();
        assert_eq!(listed, [PILL], "after {starts} starts");
        return;
    }
}
