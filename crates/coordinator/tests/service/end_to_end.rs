//! A whole run in one process, with workers that pretend.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{self, Fleet, Job, Killable, end_of, until};
use pacs_coordinator::{CoordinatorRecord, ObserveError, Progress, Recorded, RunEnd, StartError};
use pacs_protocol::v1;
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::watch_response::Event;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::net::{RunIdentity, of_run};
use pacs_runtime::{Link, Membership, Shutdown, WorkerIdentity};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_survives_a_lost_rollout_worker_and_a_failing_verifier() {
    let job = Job::new();
    let coordinator = job.start(3, "").await.unwrap();
    let record = CoordinatorRecord::read(&job.run_dir()).unwrap();
    assert_eq!((record.address, record.starts), (coordinator.address().to_string(), 1));

    let mut events = coordinator.events();
    let fleet = Fleet::start(coordinator.address(), Some(7));
    until(&mut events, |event| matches!(event, Progress::Evaluated(evaluation) if evaluation.step == 0)).await;
    until(&mut events, |event| matches!(event, Progress::Step(step) if step.step == 1)).await;
    let mut operator = OperatorServiceClient::connect(format!("http://{}", coordinator.address())).await.unwrap();
    let status = operator.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.job.as_str(), status.total_steps, status.learners_wanted), ("test", 3, 2));
    assert!(status.step >= 1 && status.metrics["loss"] == 0.5, "{status:?}");
    assert!(!status.waiting_for.is_empty() && status.counters["failed_verdicts"] > 0, "{status:?}");
    let [verifier] = &status.verifiers[..] else { panic!("one worker with one verifier: {:?}", status.verifiers) };
    assert_eq!((verifier.worker.as_str(), verifier.verifier.as_str()), ("verifier-0", "label"));
    assert!(verifier.outcomes["failed"] > 0 && verifier.outcomes["correct"] > 0, "{verifier:?}");
    assert!(verifier.p50_seconds.is_some_and(|seconds| (9e-5..1.1e-4).contains(&seconds)), "{verifier:?}");
    assert!(status.metrics["verifier_label_verdicts"] >= 8.0, "{:?}", status.metrics);
    let ranks: Vec<_> = status.workers.iter().filter_map(|worker| worker.rank).collect();
    assert_eq!(ranks, [0, 1]);

    let end = end_of(coordinator).await;
    let seen = std::sync::Arc::clone(&fleet.seen);
    fleet.join().await;
    let RunEnd::Finished { step: 3, checkpoint, model } = end else { panic!("{end:?}") };
    assert!(checkpoint.ends_with("checkpoints/step-000003") && model.join("config.json").is_file());
    check_batches(&seen.lock().unwrap());
    assert_eq!(job.steps_in("metrics.jsonl"), [1, 2, 3]);
    assert_eq!(job.steps_in("evaluations.jsonl"), [0, 3]);
    check_archive(&job);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_meets_leftovers_of_a_lost_node_finds_the_new_coordinator() {
    let (lost, new) = (Job::new(), Job::new());
    let _lost = lost.start_as("1.0").await.unwrap();
    let coordinator = new.start_as("1.1").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let point_to = |job: &Job| {
        let unfinished = folder.path().join("part");
        std::fs::copy(job.run_dir().join("coordinator.json"), &unfinished).unwrap();
        std::fs::rename(&unfinished, folder.path().join("coordinator.json")).unwrap();
    };

    point_to(&lost);
    let link = Link::local(folder.path().display().to_string(), support::PATIENCE);
    let link = Link { attempt: "1.1".to_owned(), ..link };
    let (role, name) = (pacs_types::Role::Verifier, "verifier-9".to_owned());
    let identity = WorkerIdentity { role, name, collective_address: String::new() };
    let joining = tokio::spawn(async move { Membership::join(&link, &identity, &Shutdown::new()).await });
    // Not a wait: time to ask the wrong one.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!joining.is_finished(), "it is of another start");
    point_to(&new);
    let membership = joining.await.unwrap().unwrap();
    assert_eq!(membership.run_dir, new.run_dir().display().to_string());
    membership.leave(None).await;
    drop(coordinator);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_can_be_inspected_while_it_is_live_and_afterwards() {
    let job = Job::new();
    let coordinator = job.start(5, "").await.unwrap();
    let channel = Endpoint::from_shared(format!("http://{}", coordinator.address())).unwrap().connect().await.unwrap();
    let mut observer = ObserveServiceClient::new(channel.clone());
    let mut watching = observer.watch(v1::WatchRequest { past: 512 }).await.unwrap().into_inner();
    let mut events = coordinator.events();
    let fleet = Fleet::start(coordinator.address(), None);
    until(&mut events, |event| matches!(event, Progress::Step(step) if step.step == 2)).await;
    check_reflection(channel).await;
    // The archive has the samples of a step before the line of its metrics.
    let live = observer.get_metrics(v1::GetMetricsRequest::default()).await.unwrap().into_inner();
    assert!(live.series.iter().any(|series| series.name == "loss" && series.means[0] == 0.5), "{live:?}");
    let of_step = v1::ListSamplesRequest { step: Some(1), ..Default::default() };
    let live = observer.list_samples(of_step.clone()).await.unwrap().into_inner();
    let exporter = coordinator.observer().serve_metrics("127.0.0.1:0".parse().unwrap()).await.unwrap();
    assert!(http(exporter, "/metrics").await.contains("\npacs_steps_planned 5\n"));
    assert!(http(exporter, "/other").await.starts_with("HTTP/1.1 404 "));
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 5, .. }));
    fleet.join().await;

    let (mut steps, mut numbers, mut last) = (Vec::new(), Vec::new(), None);
    while let Some(event) = watching.message().await.unwrap() {
        if let Some(Event::Step(step)) = &event.event {
            assert_eq!(step.metrics["loss"], 0.5);
            steps.push(step.step);
        }
        numbers.extend(Some(event.number).filter(|number| *number > 0));
        last = event.event;
    }
    assert_eq!(steps, [1, 2, 3, 4, 5]);
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "each event once and in order");
    assert!(matches!(&last, Some(Event::RunOver(over)) if over.how == "finished"), "{last:?}");

    let recorded = Recorded::new(&job.run_dir());
    assert_eq!(recorded.samples(of_step).unwrap(), live, "the folder says what the coordinator said");
    check_recorded(&recorded);
    job.check_signals(5 * 8);
}

/// All that a server answers to a request; it closes the connection itself.
async fn http(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: here\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// What the folder of a finished run of five steps says.
fn check_recorded(recorded: &Recorded) {
    let metrics = recorded.metrics(&v1::GetMetricsRequest { names: vec!["pass_rate".into()], ..Default::default() });
    let [series] = &metrics.unwrap().series[..] else { panic!("one series") };
    assert_eq!((&series.steps, &series.means), (&vec![1, 2, 3, 4, 5], &vec![0.5; 5]));
    let evaluations = v1::GetMetricsRequest { purpose: v1::Purpose::Evaluate.into(), ..Default::default() };
    let evaluations = recorded.metrics(&evaluations).unwrap();
    let pass = evaluations.series.iter().find(|series| series.name == "pass_at_1").unwrap();
    assert_eq!(pass.steps, [0, 5]);

    // Page by page, all of both purposes once, in order.
    let (mut samples, mut page) = (Vec::new(), String::new());
    loop {
        let request = v1::ListSamplesRequest { limit: 3, page, ..Default::default() };
        let response = recorded.samples(request).unwrap();
        assert!(response.notes.is_empty(), "{:?}", response.notes);
        samples.extend(response.samples);
        page = response.next_page;
        if page.is_empty() {
            break;
        }
    }
    assert_eq!(samples.len(), 5 * 8 + 2 * 6);
    let rounds: Vec<_> = samples.iter().map(|sample| (sample.purpose(), sample.step.unwrap())).collect();
    let mut each = rounds.clone();
    each.dedup();
    use v1::Purpose::{Evaluate, Train};
    assert_eq!(each, [(Train, 5), (Train, 4), (Train, 3), (Train, 2), (Train, 1), (Evaluate, 5), (Evaluate, 0)]);

    let request = |text: &str| v1::ListSamplesRequest { text: text.into(), limit: 500, ..Default::default() };
    let count = |request: v1::ListSamplesRequest| recorded.samples(request).unwrap().samples.len();
    assert_eq!(count(request("RIGHT")), samples.len() / 2);
    assert_eq!(count(request("evaluation: what")), 12);
    let wrong = v1::ListSamplesRequest { outcomes: vec![v1::Outcome::Wrong.into()], step: Some(5), ..request("") };
    assert_eq!(count(wrong), 4 + 3);

    for listed in &samples[..4] {
        let request = v1::GetSampleRequest { group_id: listed.group_id, index: listed.index, ..Default::default() };
        let whole = recorded.sample(&request).unwrap();
        assert_eq!(whole.sample.as_ref(), Some(listed));
        assert_eq!((whole.tokens.len(), whole.logprobs.len()), (listed.tokens as usize, listed.tokens as usize));
        assert!(!whole.prompt_tokens.is_empty() && whole.logprobs.iter().all(|logprob| *logprob == -0.5));
        assert_eq!(whole.spans.iter().map(|span| span.tokens).sum::<u32>(), listed.tokens);
        let elsewhere = v1::GetSampleRequest { step: Some(listed.step() + 1), ..request };
        assert!(matches!(recorded.sample(&elsewhere), Err(ObserveError::NotFound(_))));
    }
}

/// Tools that know nothing of the protocol can ask for it.
async fn check_reflection(channel: Channel) {
    let request = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let requests = tokio_stream::once(request);
    let mut answers = ServerReflectionClient::new(channel).server_reflection_info(requests).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = services.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"pacs.v1.ObserveService") && names.contains(&"pacs.v1.OperatorService"), "{names:?}");
}

fn check_batches(seen: &support::Seen) {
    assert!(seen.failed_verdicts > 0);
    let mut groups = BTreeSet::new();
    for (step, index) in &seen.trained {
        assert_eq!(index.len(), 8, "4 groups of 2 samples");
        for entry in index {
            // A failed verification would show as 0.5, a sample that was counted as wrong as 0.
            let expected = if entry.sample_index == 0 { 1.0 } else { 0.0 };
            assert_eq!(entry.label, expected, "step {step}: {entry:?}");
            groups.insert(entry.group_id);
        }
        let mut positions: Vec<u32> = seen.sequences[step].iter().map(|data| data.position).collect();
        positions.sort_unstable();
        assert!(positions.into_iter().eq(0..8), "every sequence is computed by one rank");
    }
    assert_eq!(seen.trained.len(), 3);
    assert_eq!(groups.len(), 12, "no group is trained on twice");
    for (purpose, version, stream) in &seen.streams {
        let expected = if *purpose == v1::Purpose::Evaluate { 1 + version } else { 0 };
        assert_eq!(*stream, expected);
    }
}

/// The rows of a file of archived samples.
fn archived(job: &Job, name: &str) -> Vec<serde_json::Value> {
    let file = File::open(job.run_dir().join("samples").join(name)).unwrap();
    let reader = SerializedFileReader::new(file).unwrap();
    let rows = reader.get_row_iter(None).unwrap();
    rows.map(|row| {
        let row = row.unwrap();
        row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect::<serde_json::Map<_, _>>().into()
    })
    .collect()
}

fn check_archive(job: &Job) {
    let rows = |name: &str| archived(job, name);
    for step in 1..=3 {
        let rows = rows(&format!("step-{step:06}.parquet"));
        assert_eq!(rows.len(), 8);
        for row in rows {
            assert_eq!((&row["step"], &row["version"]), (&step.into(), &serde_json::Value::from(step - 1)));
            assert_eq!(row["token_ids"].as_array().unwrap().len() as u64, row["tokens"].as_u64().unwrap());
            assert!(row["question"].as_str().unwrap().starts_with("train: "));
        }
    }
    let evaluated = rows("eval-000003.parquet");
    assert_eq!(evaluated.len(), 6);
    assert!(evaluated.iter().all(|row| row["purpose"] == "evaluate"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_run_resumes_and_a_damaged_checkpoint_falls_back() {
    let job = Job::new();
    let coordinator = job.start(50, "").await.unwrap();
    let mut events = coordinator.events();
    let fleet = Fleet::start(coordinator.address(), None);
    until(&mut events, |event| matches!(event, Progress::Step(step) if step.step == 3)).await;
    coordinator.request_stop();
    let end = end_of(coordinator).await;
    fleet.join().await;
    let RunEnd::Stopped { step: stopped, checkpoint: Some(checkpoint) } = end else { panic!("{end:?}") };
    assert!(stopped >= 3 && checkpoint.join("manifest.json").is_file());
    assert_eq!(job.steps_in("metrics.jsonl"), (1..=stopped).collect::<Vec<_>>());

    let refused = job.start(50, "[objective]\nbeta = 2.0").await.unwrap_err();
    assert!(
        matches!(&refused, StartError::SpecChanged { changes, .. } if changes == &["objective.beta: was 1.0, is 2.0"]),
        "{refused}"
    );

    let total = stopped + 2;
    // The one before is the newest even step: it is kept.
    let before = if stopped % 2 == 0 { stopped - 2 } else { stopped - 1 };
    std::fs::write(checkpoint.join("training-state-1-of-2.safetensors"), "something else").unwrap();
    let coordinator = job.start(total, "[optimizer]\nlearning_rate = 1e-5").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    let end = end_of(coordinator).await;
    let seen = std::sync::Arc::clone(&fleet.seen);
    fleet.join().await;
    assert!(matches!(end, RunEnd::Finished { step, .. } if step == total), "{end:?}");
    assert_eq!(job.steps_in("metrics.jsonl"), (1..=total).collect::<Vec<_>>());
    assert_eq!(job.steps_in("evaluations.jsonl"), [0, total]);
    {
        let seen = seen.lock().unwrap();
        let (from, step) = &seen.started_from[0];
        assert_eq!((*step, from.ends_with(&format!("step-{before:06}"))), (before, true), "{from}");
        // Prompts continue where that checkpoint was: 4 a step.
        let first = seen.trained[&(before + 1)].iter().map(|entry| entry.group_id).min();
        assert_eq!(first, Some(4 * before));
    }

    let coordinator = job.start(total, "").await.unwrap();
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { .. }), "a complete job ends where it starts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_learner_undoes_what_was_not_saved() {
    let job = Job::new();
    let coordinator = job.start(9, "").await.unwrap();
    let mut events = coordinator.events();
    let mut fleet = Fleet::start(coordinator.address(), None);
    until(&mut events, |event| matches!(event, Progress::Saved { step: 2, .. })).await;
    fleet.replace_learner(coordinator.address()).await;
    until(&mut events, |event| matches!(event, Progress::WorkerLost { name, .. } if name == "learner-1")).await;
    let end = end_of(coordinator).await;
    let seen = std::sync::Arc::clone(&fleet.seen);
    fleet.join().await;
    assert!(matches!(end, RunEnd::Finished { step: 9, .. }), "{end:?}");
    assert_eq!(job.steps_in("metrics.jsonl"), (1..=9).collect::<Vec<_>>());
    assert_eq!(job.steps_in("evaluations.jsonl"), [0, 9]);
    let seen = seen.lock().unwrap();
    let [(first, 0), (checkpoint, step)] = seen.started_from.as_slice() else { panic!("{:?}", seen.started_from) };
    assert!(first.is_empty() && *step >= 2 && checkpoint.ends_with(&format!("step-{step:06}")), "{checkpoint}");
    for (step, index) in &seen.trained {
        let groups: BTreeSet<u64> = index.iter().map(|entry| entry.group_id).collect();
        assert!(groups.into_iter().eq(4 * (step - 1)..4 * step), "step {step} has the prompts of its place");
    }
    job.check_signals(9 * 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_line_of_an_evaluation_that_was_lost_does_not_stay() {
    let job = Job::new();
    let coordinator = job.start(2, "").await.unwrap();
    coordinator.request_stop();
    assert_eq!(end_of(coordinator).await, RunEnd::Stopped { step: 0, checkpoint: None });
    // What a coordinator leaves that is killed between the line and the record of the evaluation.
    std::fs::write(job.run_dir().join("evaluations.jsonl"), "{\"step\": 0, \"pass_at_1\": 0.25}\n").unwrap();
    let coordinator = job.start(2, "").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 2, .. }));
    fleet.join().await;
    assert_eq!(job.steps_in("evaluations.jsonl"), [0, 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_or_port_in_use_is_one_clear_error() {
    let (job, other) = (Job::new(), Job::new());
    let coordinator = job.start(1, "").await.unwrap();
    let busy = job.start(1, "").await.unwrap_err();
    assert!(matches!(busy, StartError::Busy { .. }), "{busy}");
    let taken = other.start_at(1, "", coordinator.address()).await.unwrap_err();
    assert!(matches!(taken, StartError::Listen { .. }), "{taken}");
    coordinator.request_stop();
    assert_eq!(end_of(coordinator).await, RunEnd::Stopped { step: 0, checkpoint: None });
}

/// Rollouts that run ahead are verified while the policy is measured, and the steps count that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evaluation_takes_nothing_from_the_counts_of_the_steps() {
    let job = Job::new();
    let coordinator = job.start(4, "[asynchrony]\nmax_lag = 2").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    let seen = std::sync::Arc::clone(&fleet.seen);
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { .. }));
    fleet.join().await;
    let lines = std::fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sum = |name: &str| lines.iter().map(|line| line[name].as_f64().unwrap()).sum::<f64>();
    let seen = seen.lock().unwrap();
    assert!(seen.failed_measurements > 0, "no verification of an evaluation failed");
    let of_steps = (seen.failed_verdicts - seen.failed_measurements) as f64;
    assert_eq!((sum("failed_verdicts"), sum("verifier_label_failed")), (of_steps, of_steps));
}

/// With lag, the next step is trained during an evaluation, whose samples all come from one version.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_evaluations_are_complete_and_have_one_version_each() {
    let job = Job::evaluated(1);
    let coordinator = job.start(6, "[asynchrony]\nmax_lag = 1").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 6, .. }));
    fleet.join().await;
    assert_eq!(job.steps_in("metrics.jsonl"), (1..=6).collect::<Vec<_>>());
    assert_eq!(job.steps_in("evaluations.jsonl"), (0..=6).collect::<Vec<_>>());
    for step in 0..=6u64 {
        let rows = archived(&job, &format!("eval-{step:06}.parquet"));
        assert_eq!(rows.len(), 6, "3 problems of 2 samples");
        assert!(rows.iter().all(|row| row["version"] == step), "{rows:?}");
    }
}

/// Problems are indexed by place: the same spec with an edited file would train old answers with other prompts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_does_not_resume_with_other_problems() {
    let row = |i: u32| (format!("train: what is {i} + 1?"), (i + 1).to_string());
    let rows: Vec<_> = (0..10).map(row).collect();
    let job = Job::new();
    // Before the first checkpoint nothing is lost: what was in flight is dropped.
    let coordinator = job.start(2, "").await.unwrap();
    coordinator.request_stop();
    assert_eq!(end_of(coordinator).await, RunEnd::Stopped { step: 0, checkpoint: None });
    job.write_problems("train", &rows[1..]);
    let coordinator = job.start(2, "").await.unwrap();
    let mut events = coordinator.events();
    let is_note =
        |event: &Progress| matches!(event, Progress::Note { text } if text.contains("the problems have changed"));
    until(&mut events, is_note).await;
    let fleet = Fleet::start(coordinator.address(), None);
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 2, .. }));
    fleet.join().await;

    // Gone and new, moved, and another answer: with a checkpoint each is refused.
    let other = [[&rows[2..], &[row(77)]].concat(), rows.iter().skip(1).rev().cloned().collect(), {
        let mut rows = rows[1..].to_vec();
        rows[3].1 = "8".into();
        rows
    }];
    for changed in &other {
        job.write_problems("train", changed);
        let refused = job.start(3, "").await.unwrap_err();
        assert!(matches!(&refused, StartError::ProblemsChanged { changes, .. } if changes.len() == 1), "{refused}");
        assert_eq!(refused.exit().code(), 78);
    }
    job.write_problems("train", &rows[1..]);
    job.write_problems("evaluation", &[row(100)]);
    let refused = job.start(3, "").await.unwrap_err().to_string();
    assert!(refused.contains("problems of the set `evaluation`: 3 before, 1 now"), "{refused}");
    job.write_problems(
        "evaluation",
        &(0..3).map(|i| (format!("evaluation: what is {i} + 1?"), (i + 1).to_string())).collect::<Vec<_>>(),
    );

    // A folder of an earlier version says nothing of its problems: it resumes, and remembers.
    std::fs::remove_file(job.run_dir().join("problems.json")).unwrap();
    let coordinator = job.start(3, "").await.unwrap();
    let is_note = |event: &Progress| matches!(event, Progress::Note { text } if text.contains("an earlier version"));
    until(&mut coordinator.events(), is_note).await;
    drop(coordinator);
    job.write_problems("train", &rows);
    assert!(matches!(job.start(3, "").await, Err(StartError::ProblemsChanged { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_case_of_edited_data_is_refused() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/edited-data");
    let job = Job::new();
    let put = |name: &str| std::fs::copy(case.join(name), job.run_dir().parent().unwrap().join("train.jsonl")).unwrap();
    put("before.jsonl");
    let coordinator = job.start(2, "").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { step: 2, .. }));
    fleet.join().await;
    put("after.jsonl");
    let refused = job.start(4, "").await.unwrap_err().to_string();
    let said = "12 before, 12 now, 1 of them gone and 1 new, such as number 12 (`number 999`)";
    assert!(refused.contains(said) && refused.contains("step-000002"), "{refused}");
    put("before.jsonl");
    assert!(job.start(4, "").await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_damaged_checkpoints_are_no_fresh_start() {
    let job = Job::new();
    let coordinator = job.start(1, "").await.unwrap();
    let fleet = Fleet::start(coordinator.address(), None);
    let RunEnd::Finished { checkpoint, .. } = end_of(coordinator).await else { panic!("it finishes") };
    fleet.join().await;
    std::fs::remove_file(checkpoint.join("training-state-0-of-2.safetensors")).unwrap();
    let refused = job.start(1, "").await.unwrap_err();
    assert!(
        matches!(&refused, StartError::NoValidCheckpoint { damages, .. } if damages[0].contains("training-state-0-of-2.safetensors")),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_when_it_is_told_to() {
    support::serve_if_told().await;
}

/// Kills the coordinator again and again at any moment; its workers live on, and nothing is done twice.
async fn survives_kills(changes: &str, evaluated_every: u64, steps: u64) {
    let (job, address) = (Job::evaluated(evaluated_every), support::free_address());
    let mut coordinator = Killable::start(&job, steps, changes, address);
    support::until_it_serves(address).await;
    let fleet = Fleet::start(address, None);
    let seen = std::sync::Arc::clone(&fleet.seen);
    let handed_in = || seen.lock().unwrap().streams.len();
    for leases in [4, 7, 5] {
        let before = handed_in();
        support::wait_for("work", || handed_in() > before + leases).await;
        coordinator.kill();
        coordinator = Killable::start(&job, steps, changes, address);
    }
    coordinator.wait().await;
    fleet.join().await;
    let seen = seen.lock().unwrap();
    assert!(seen.retries > 0, "nobody has noticed the kills");
    assert_eq!((seen.asked_again, seen.trained_again), (0, 0), "acknowledged work was asked for again");
    assert_eq!(seen.started_from.len(), 1, "the learners are one generation: {:?}", seen.started_from);
    assert_eq!(job.steps_in("metrics.jsonl"), (1..=steps).collect::<Vec<_>>());
    let is_due =
        |step: &u64| [0, steps].contains(step) || (evaluated_every > 0 && step.is_multiple_of(evaluated_every));
    assert_eq!(job.steps_in("evaluations.jsonl"), (0..=steps).filter(is_due).collect::<Vec<_>>());
    let groups: Vec<u64> = seen.trained.values().flatten().map(|entry| entry.group_id).collect();
    assert_eq!(groups.iter().collect::<BTreeSet<_>>().len() as u64, 4 * steps, "no group is trained on twice");
    assert_eq!(groups.len() as u64, 8 * steps);
    job.check_signals(8 * steps as usize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_coordinator_resumes_with_the_same_learners_and_repeats_nothing() {
    survives_kills("", 0, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_does_one_whose_rollouts_run_ahead() {
    survives_kills("[asynchrony]\nmax_lag = 2", 0, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_does_one_that_evaluates_every_version_meanwhile() {
    survives_kills("[asynchrony]\nmax_lag = 2", 1, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_of_a_live_process_is_refused_and_a_returning_holder_is_dismissed() {
    let job = Job::new();
    let coordinator = job.start(3, "").await.unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address())).unwrap();
    let run = RunIdentity::told(coordinator.run_id()).unwrap();
    let mut client = WorkerServiceClient::new(of_run(endpoint.connect().await.unwrap(), run));
    let registration = |pid| v1::RegisterRequest {
        role: v1::Role::Verifier.into(),
        name: "verifier-0".into(),
        host: "here".into(),
        pid,
        version: env!("CARGO_PKG_VERSION").into(),
        ..v1::RegisterRequest::default()
    };
    let beat = |worker_id| v1::HeartbeatRequest { worker_id, ..Default::default() };
    let first = client.register(registration(1)).await.unwrap().into_inner().worker_id;
    // For longer than a worker may be silent, the holder beats.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let refused = client.register(registration(2)).await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
        assert!(refused.message().contains("process 1 on here"), "{refused}");
        assert_eq!(client.heartbeat(beat(first)).await.unwrap().into_inner().directive(), v1::Directive::Continue);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Now it stands still.
    let mut clients = client.clone();
    let taken = async {
        loop {
            match clients.register(registration(2)).await {
                Ok(registered) => return registered.into_inner().worker_id,
                Err(refused) => assert_eq!(refused.code(), Code::AlreadyExists, "{refused}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let second = tokio::time::timeout(support::PATIENCE, taken).await.expect("the name is free again");
    assert_eq!(client.heartbeat(beat(first)).await.unwrap().into_inner().directive(), v1::Directive::Replaced);
    assert_eq!(client.register(registration(1)).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.heartbeat(beat(second)).await.unwrap().into_inner().directive(), v1::Directive::Continue);
}

fn json(field: &Field) -> serde_json::Value {
    match field {
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(value) => value.as_str().into(),
        Field::Null => serde_json::Value::Null,
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        other => panic!("column of {other:?}"),
    }
}
