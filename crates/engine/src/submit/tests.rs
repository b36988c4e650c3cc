use std::sync::{Arc, Mutex};

use pacs_types::{FinishReason, Sample, WeightVersion};
use tokio::sync::Semaphore;

use super::*;
use crate::Finished;

/// A coordinator that answers a call when it is let, as it was told to.
#[derive(Clone)]
struct Coordinator {
    /// Permits to answer.
    answers: Arc<Semaphore>,
    seen: Arc<Mutex<Seen>>,
    reply: fn(&v1::SubmitSampleRequest, usize) -> Result<(), Status>,
}

#[derive(Default)]
struct Seen {
    /// Lease and index of every call, in the order in which they came.
    calls: Vec<(u64, u32)>,
    open: usize,
    most_open: usize,
}

impl Coordinator {
    fn new(reply: fn(&v1::SubmitSampleRequest, usize) -> Result<(), Status>) -> Self {
        Self { answers: Arc::new(Semaphore::new(0)), seen: Arc::default(), reply }
    }

    async fn submit(self, request: v1::SubmitSampleRequest) -> Result<(), Status> {
        let of_sample = (request.lease_id, request.sample_index);
        let times = {
            let mut seen = self.seen.lock().unwrap();
            seen.calls.push(of_sample);
            seen.open += 1;
            seen.most_open = seen.most_open.max(seen.open);
            seen.calls.iter().filter(|call| **call == of_sample).count()
        };
        self.answers.acquire().await.expect("it is never closed").forget();
        self.seen.lock().unwrap().open -= 1;
        (self.reply)(&request, times)
    }
}

/// A worker with leases of four samples each.
struct Worker {
    outputs: mpsc::Sender<Output>,
    in_flight: watch::Receiver<usize>,
    cancelled: std::sync::mpsc::Receiver<u64>,
    ended: tokio::task::JoinHandle<Result<Infallible, ServeError>>,
}

fn worker(coordinator: &Coordinator, leases: u64) -> Worker {
    worker_with(coordinator, leases, PATIENCE)
}

fn worker_with(coordinator: &Coordinator, leases: u64, patience: Duration) -> Worker {
    let (outputs, receiver) = mpsc::channel(1000);
    let (in_flight_sender, in_flight) = watch::channel(4 * leases as usize);
    let (lease_sender, lease_receiver) = mpsc::channel(leases as usize);
    let (cancel_sender, cancelled) = std::sync::mpsc::channel();
    for lease in 0..leases {
        let held = Held { lease, group: 100 + lease, samples_left: 4 };
        lease_sender.try_send(held).expect("there is room");
    }
    let coordinator = coordinator.clone();
    let call = move |request| coordinator.clone().submit(request);
    let cancel = move |ticket| cancel_sender.send(ticket).expect("the test listens");
    let mut submitting =
        Submitting::new(call, 1, &RunIdentity::default(), in_flight_sender, lease_receiver, cancel, |_| {});
    submitting.patience = patience;
    let ended = tokio::spawn(submitting.run(receiver));
    Worker { outputs, in_flight, cancelled, ended }
}

/// Waits until so many samples are in flight.
async fn wait_for(worker: &mut Worker, in_flight: usize) {
    let found = worker.in_flight.wait_for(|found| *found == in_flight);
    tokio::time::timeout(Duration::from_secs(30), found).await.expect("it continues").expect("it continues");
}

fn finished(ticket: u64, index: u32) -> Output {
    let sample = Sample {
        tokens: vec![1],
        logprobs: vec![-0.5],
        entropy_sum: 0.5,
        text: String::new(),
        finish: FinishReason::Stop,
        version: WeightVersion(0),
        sampled_logprobs: Vec::new(),
        spans: Vec::new(),
        routes: Vec::new(),
    };
    Output::Finished(Box::new(Finished { ticket, index, sample }))
}

/// Lets everything happen that can happen without time.
async fn rest() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn calls_go_side_by_side_in_their_order_and_no_further_than_the_window() {
    let coordinator = Coordinator::new(|_, _| Ok(()));
    let worker = worker(&coordinator, 50);
    let samples: Vec<(u64, u32)> = (0..50).flat_map(|lease| (0..4).map(move |index| (lease, index))).collect();
    for (lease, index) in &samples {
        worker.outputs.send(finished(*lease, *index)).await.expect("it listens");
    }
    rest().await;
    assert_eq!(coordinator.seen.lock().unwrap().calls.len(), WINDOW, "nothing is answered yet");
    coordinator.answers.add_permits(3);
    rest().await;
    assert_eq!(*worker.in_flight.borrow(), 197);
    coordinator.answers.add_permits(1000);
    rest().await;
    let seen = coordinator.seen.lock().unwrap();
    assert_eq!((seen.most_open, *worker.in_flight.borrow()), (WINDOW, 0));
    assert_eq!(seen.calls, samples);
}

#[tokio::test]
async fn an_unanswered_call_is_repeated_and_delays_no_other() {
    // The first call of one sample fails, and so does the second.
    let coordinator = Coordinator::new(|request, times| match (request.sample_index, times) {
        (1, 1 | 2) => Err(Status::unavailable("not now")),
        _ => Ok(()),
    });
    coordinator.answers.add_permits(1000);
    let mut worker = worker(&coordinator, 1);
    for index in 0..4 {
        worker.outputs.send(finished(0, index)).await.expect("it listens");
    }
    wait_for(&mut worker, 0).await;
    let calls: Vec<u32> = coordinator.seen.lock().unwrap().calls.iter().map(|call| call.1).collect();
    assert_eq!(calls, [0, 1, 2, 3, 1, 1]);
    assert!(worker.cancelled.try_recv().is_err(), "nothing is cancelled");
}

#[tokio::test]
async fn a_lapsed_lease_is_cancelled_once_and_counted_once() {
    let coordinator = Coordinator::new(|request, _| match request.lease_id {
        0 => Err(Status::failed_precondition("the lease lapsed")),
        _ => Ok(()),
    });
    let mut worker = worker(&coordinator, 2);
    for (lease, index) in [(0, 0), (0, 1), (1, 0)] {
        worker.outputs.send(finished(lease, index)).await.expect("it listens");
    }
    rest().await;
    coordinator.answers.add_permits(1000);
    // Two samples of the first lease were never handed in, three of the second are still to come.
    wait_for(&mut worker, 3).await;
    assert!(matches!(worker.cancelled.try_recv(), Ok(0)));
    // What the engine finished meanwhile is dropped.
    worker.outputs.send(finished(0, 2)).await.expect("it listens");
    for index in 1..4 {
        worker.outputs.send(finished(1, index)).await.expect("it listens");
    }
    wait_for(&mut worker, 0).await;
    assert!(worker.cancelled.try_recv().is_err());
    assert_eq!(coordinator.seen.lock().unwrap().calls.len(), 6);
}

#[tokio::test]
async fn samples_are_sent_before_the_final_message_of_the_engine() {
    let coordinator = Coordinator::new(|_, _| Ok(()));
    let worker = worker(&coordinator, 1);
    worker.outputs.send(finished(0, 0)).await.expect("it listens");
    worker.outputs.send(Output::Failed("no memory".into())).await.expect("it listens");
    rest().await;
    assert!(!worker.ended.is_finished(), "the sample is not answered yet");
    coordinator.answers.add_permits(1);
    let ended = worker.ended.await.expect("no panic");
    assert!(matches!(ended, Err(ServeError::Fatal(RolloutError::Engine(problem))) if problem == "no memory"));
    assert_eq!(*worker.in_flight.borrow(), 3);
}

#[tokio::test]
async fn retries_are_bounded() {
    let coordinator = Coordinator::new(|_, _| Err(Status::unavailable("never")));
    coordinator.answers.add_permits(1000);
    let worker = worker_with(&coordinator, 1, Duration::from_millis(150));
    worker.outputs.send(finished(0, 0)).await.expect("it listens");
    let ended = worker.ended.await.expect("no panic");
    assert!(matches!(ended, Err(ServeError::Rejoin(problem)) if problem.contains("never")));
    assert_eq!(coordinator.seen.lock().unwrap().calls.len(), 3, "the last one when patience is over");
    let unknown = Coordinator::new(|_, _| Err(Status::not_found("who are you")));
    unknown.answers.add_permits(1);
    let worker = self::worker(&unknown, 1);
    worker.outputs.send(finished(0, 0)).await.expect("it listens");
    assert!(matches!(worker.ended.await.expect("no panic"), Err(ServeError::Rejoin(_))));
}

#[tokio::test]
async fn samples_that_are_given_up_make_room_and_are_not_submitted() {
    let coordinator = Coordinator::new(|_, _| Ok(()));
    coordinator.answers.add_permits(1000);
    let mut worker = worker(&coordinator, 1);
    worker.outputs.send(finished(0, 0)).await.expect("it listens");
    for index in 1..4 {
        let given_up = Output::GivenUp { ticket: 0, index, reason: "no server answers".into() };
        worker.outputs.send(given_up).await.expect("it listens");
    }
    wait_for(&mut worker, 0).await;
    assert_eq!(coordinator.seen.lock().unwrap().calls, [(0, 0)]);
    worker.outputs.send(Output::Refused("other weights".into())).await.expect("it listens");
    let ended = worker.ended.await.expect("no panic");
    assert!(matches!(ended, Err(ServeError::Fatal(RolloutError::Config(problem))) if problem == "other weights"));
}
