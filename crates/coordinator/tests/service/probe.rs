//! The probe of a version on its way from the learner to rollout workers.

use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_runtime::net::RunChannel;
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use tonic::Code;

use crate::samples::{PROMPTS, SAMPLES, WAIT_MS, connect, hand_in, join, judge, prepared, start, train_task};

type Change = fn(&mut v1::Probe);

/// What a learner may send in place of a probe, and the field that it is refused by.
const WRONG: [(Change, &str); 6] = [
    (|probe| probe.logprobs[0] = f32::NAN, "weights.probe.logprobs"),
    (|probe| probe.logprobs[1] = 0.5, "weights.probe.logprobs"),
    (|probe| probe.previous_logprobs[1] = f32::NEG_INFINITY, "weights.probe.previous_logprobs"),
    (|probe| probe.tokens = vec![1; 1025], "weights.probe.tokens"),
    (|probe| probe.answer_from = 9, "weights.probe.answer_from"),
    (|probe| probe.previous_version = 1, "weights.probe.previous_version"),
];

fn probe() -> v1::Probe {
    v1::Probe {
        tokens: vec![5, 6, 7, 8],
        answer_from: 2,
        logprobs: vec![-1.5, -0.25],
        previous_logprobs: vec![-1.0, -0.5],
        previous_version: 0,
    }
}

/// A step's result whose weights come with this probe.
fn trained(generation: u64, probe: v1::Probe) -> Done {
    let description = Description::of(VersionId::new(generation, 1), WeightKind::Float32, &[1; 4]);
    let weights = v1::WeightsRef::from(&Announcement { description, address: String::new(), probe: None });
    let weights = Some(v1::WeightsRef { probe: Some(probe), ..weights });
    Done::Trained(v1::TrainResult { weights, metrics: [("loss".to_owned(), 0.5)].into(), ..Default::default() })
}

/// A rank that trains one step, after it has tried every wrong probe.
async fn learner(channel: RunChannel, slot: u32) {
    let (worker_id, generation, mut client) = prepared(&channel, slot).await;
    let (task_id, _) = train_task(&mut client, worker_id, generation).await.expect("no worker was lost");
    let request = |probe| {
        let result = Some(trained(generation, probe));
        v1::CompleteTaskRequest { worker_id, generation, task_id, result }
    };
    for (change, field) in WRONG {
        let mut wrong = probe();
        change(&mut wrong);
        let refused = client.complete_task(request(wrong)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(&format!("`{field}`")), "{refused}");
    }
    client.complete_task(request(probe())).await.unwrap();
}

/// The announcement of version 1.
async fn announced(channel: &RunChannel, worker_id: u64) -> v1::WeightsRef {
    let mut client = RolloutServiceClient::new(channel.clone());
    loop {
        let request = v1::AwaitWeightsRequest { worker_id, wait_ms: WAIT_MS, ..Default::default() };
        let weights = client.await_weights(request).await.unwrap().into_inner().weights;
        if let Some(weights) = weights.filter(|weights| weights.version == 1) {
            return weights;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_is_announced_as_it_was_made_and_a_wrong_one_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let learners = [0, 1].map(|slot| tokio::spawn(learner(channel.clone(), slot)));
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    hand_in(&channel, rollout, PROMPTS * SAMPLES, |_| 1000).await;
    let verifier = join(&channel, v1::Role::Verifier, "verifier-0").await;
    judge(&channel, verifier, PROMPTS * SAMPLES).await;
    for learner in learners {
        learner.await.unwrap();
    }
    assert_eq!(announced(&channel, rollout).await.probe, Some(probe()));

    // A coordinator that starts again has it from its journal.
    drop((channel, coordinator));
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let rollout = join(&channel, v1::Role::Rollout, "rollout-1").await;
    assert_eq!(announced(&channel, rollout).await.probe, Some(probe()));
}
