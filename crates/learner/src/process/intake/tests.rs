use std::sync::{Arc, Mutex};

use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::learner_service_server::{LearnerService, LearnerServiceServer};
use pacs_runtime::net::{Security, accept};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::{Channel, Endpoint, Server};

use super::*;

use crate::update::TrainBatch;

const PATIENCE: Duration = Duration::from_secs(30);

/// Task of rank 1: five sequences of four groups, in an index of eight.
fn task() -> v1::TrainTask {
    let own_tokens = own().iter().map(|data| data.tokens.len() as u64).sum();
    v1::TrainTask {
        step: 3,
        sequences: 8,
        rank_sequences: 5,
        rank_tokens: own_tokens,
        rank_groups: 4,
        learning_rate: None,
    }
}

fn index() -> Vec<v1::SequenceIndex> {
    let entry = |position: u32| v1::SequenceIndex {
        group_id: u64::from(position / 2),
        sample_index: position % 2,
        mini_batch: position / 4,
        rank: u32::from(!position.is_multiple_of(3)),
        label: 0.5,
        reward: -1.0,
        answer_tokens: 1 + position,
        truncated: false,
        unit: None,
    };
    (0..8).map(entry).collect()
}

fn own() -> Vec<v1::SequenceData> {
    let data = |entry: (u32, v1::SequenceIndex)| v1::SequenceData {
        position: entry.0,
        tokens: vec![entry.0; entry.1.answer_tokens as usize],
        rollout_logprobs: vec![-1.0; entry.1.answer_tokens as usize],
        version: 3,
        sampled_logprobs: vec![-0.5; if entry.0.is_multiple_of(2) { 0 } else { entry.1.answer_tokens as usize }],
        routes: vec![entry.0 as u8; entry.1.answer_tokens as usize - 1].into(),
    };
    (0..).zip(index()).filter(|(_, entry)| entry.rank == 1).map(data).collect()
}

fn prompt(group_id: u64) -> v1::GroupPrompt {
    v1::GroupPrompt { group_id, tokens: vec![9, 9], routes: vec![group_id as u8; 2].into() }
}

/// The batch in six pieces: two of the index, then sequences 1; 2; 4 and 5; 7.
fn pieces() -> Vec<v1::BatchPiece> {
    let (index, mut own) = (index(), own().into_iter());
    let mut sequences = |prompts: &[u64], count| v1::BatchPiece {
        index: Vec::new(),
        prompts: prompts.iter().copied().map(prompt).collect(),
        sequences: own.by_ref().take(count).collect(),
    };
    let of_index =
        |range: std::ops::Range<usize>| v1::BatchPiece { index: index[range].to_vec(), ..Default::default() };
    vec![of_index(0..3), of_index(3..8), sequences(&[0], 1), sequences(&[1], 1), sequences(&[2], 2), sequences(&[3], 1)]
}

fn taken(task: &v1::TrainTask, pieces: Vec<v1::BatchPiece>) -> Result<TrainBatch, String> {
    let mut intake = Intake::new(task, 1).map_err(|error| error.problem)?;
    for piece in pieces {
        intake.take(piece).map_err(|error| error.problem)?;
    }
    if intake.is_whole() { Ok(intake.finish()) } else { Err("it is not whole".to_owned()) }
}

#[test]
fn pieces_become_the_batch() {
    let batch = taken(&task(), pieces()).unwrap();
    assert_eq!((batch.step, batch.index.len(), batch.mini_batches()), (3, 8, 2));
    let positions: Vec<usize> = batch.sequences.iter().map(|sequence| sequence.position).collect();
    assert_eq!(positions, [1, 2, 4, 5, 7]);
    assert_eq!((batch.prompts.len(), batch.prompt_routes.len()), (4, 4));
    assert!(batch.prompt_routes.iter().all(|(group, routes)| *routes == [*group as u8; 2]));
    for sequence in &batch.sequences {
        assert_eq!(sequence.tokens, vec![sequence.position as u32; 1 + sequence.position]);
        assert_eq!(sequence.behaviour_logprobs().len(), sequence.tokens.len());
        assert_eq!(sequence.routes, vec![sequence.position as u8; sequence.position]);
    }
}

#[test]
fn contradictions_are_refused_and_say_what_they_are() {
    let refused = |change: fn(&mut v1::TrainTask, &mut Vec<v1::BatchPiece>), expected: &str| {
        let (mut task, mut pieces) = (task(), pieces());
        change(&mut task, &mut pieces);
        let problem = taken(&task, pieces).expect_err(expected);
        assert!(problem.contains(expected), "`{problem}` does not say `{expected}`");
    };
    refused(|task, _| task.sequences = 0, "has no sequences");
    refused(|task, _| task.rank_sequences = 9, "9 of its 8 sequences");
    refused(|task, _| task.rank_tokens += 1, "its index gives it 5 of");
    refused(|task, _| task.rank_sequences = 4, "its index gives it 5 of");
    refused(|task, _| task.sequences = 7, "entry 7 of its index is one too many");
    refused(|_, pieces| pieces[1].index[0].mini_batch = 7, "is not in mini-batch order");
    refused(|_, pieces| pieces[0].index[0].label = f64::NAN, "label NaN");
    refused(|_, pieces| pieces[0].index[0].label = 1.5, "label 1.5");
    refused(|_, pieces| pieces[0].index[0].reward = f64::INFINITY, "reward inf");
    refused(|_, pieces| pieces[0].index[0].answer_tokens = 0, "has no tokens");
    refused(|_, pieces| pieces.swap(1, 2), "before the whole index");
    refused(|_, pieces| pieces.insert(3, v1::BatchPiece::default()), "is empty");
    refused(|_, pieces| pieces[2].prompts.clear(), "before the prompt of group 0");
    refused(|_, pieces| pieces[2].prompts[0].tokens.clear(), "prompt of group 0 is empty");
    refused(|_, pieces| pieces[3].prompts.push(prompt(0)), "prompt of group 0 is one too many");
    refused(|_, pieces| pieces.swap(2, 3), "sequence 2 came to rank 1 where sequence 1 was expected");
    refused(|_, pieces| pieces[3].sequences = pieces[2].sequences.clone(), "sequence 1 came to rank 1");
    refused(|_, pieces| pieces[2].sequences[0].position = 0, "sequence 0 came to rank 1");
    refused(|_, pieces| pieces[2].sequences[0].position = u32::MAX, "came to rank 1");
    refused(|_, pieces| pieces[5].sequences.push(own()[0].clone()), "where none was expected");
    refused(|_, pieces| pieces[2].sequences[0].tokens.push(1), "has 3 tokens, 2 and 2 log-probs, and 2 tokens");
    refused(|_, pieces| pieces[2].sequences[0].rollout_logprobs.truncate(1), "has 2 tokens, 1 and");
    refused(|_, pieces| pieces[2].sequences[0].sampled_logprobs.truncate(1), "has 2 tokens, 2 and 1");
    refused(|_, pieces| pieces[2].sequences[0].rollout_logprobs[1] = f32::NAN, "a log-prob of NaN");
    refused(|_, pieces| pieces[2].sequences[0].sampled_logprobs[1] = f32::NEG_INFINITY, "a log-prob of -inf");
    refused(|_, pieces| drop(pieces.pop()), "not whole");
}

/// A coordinator that answers successive calls as scripted: with pieces, then an error or the end of the stream.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<ToldInner>>);

#[derive(Default)]
struct ToldInner {
    answers: Vec<(Vec<v1::BatchPiece>, Option<Status>)>,
    asked: Vec<(u32, u32)>,
}

#[tonic::async_trait]
impl LearnerService for Told {
    type StreamBatchStream = ReceiverStream<Result<v1::BatchPiece, Status>>;

    async fn stream_batch(
        &self,
        request: Request<v1::StreamBatchRequest>,
    ) -> Result<Response<Self::StreamBatchStream>, Status> {
        let request = request.into_inner();
        let mut told = self.0.lock().unwrap();
        told.asked.push((request.index_received, request.sequences_received));
        let (pieces, error) = told.answers.remove(0);
        let (sender, receiver) = mpsc::channel(100);
        for piece in pieces {
            sender.try_send(Ok(piece)).unwrap();
        }
        if let Some(error) = error {
            sender.try_send(Err(error)).unwrap();
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn join_generation(
        &self,
        _: Request<v1::JoinGenerationRequest>,
    ) -> Result<Response<v1::JoinGenerationResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn next_task(&self, _: Request<v1::NextTaskRequest>) -> Result<Response<v1::NextTaskResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn complete_task(
        &self,
        _: Request<v1::CompleteTaskRequest>,
    ) -> Result<Response<v1::CompleteTaskResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

/// Receives the batch of [`task`] from such a coordinator; returns the requests and the outcome.
async fn received(
    answers: Vec<(Vec<v1::BatchPiece>, Option<Status>)>,
    patience: Duration,
) -> (Vec<(u32, u32)>, Result<TrainBatch, IntakeError>) {
    let told = Told(Arc::new(Mutex::new(ToldInner { answers, asked: Vec::new() })));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(LearnerServiceServer::new(told.clone()));
    let serving = tokio::spawn(server.serve_with_incoming(accept(listener, Security::Plain)));
    let channel: Channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let client = LearnerServiceClient::new(channel).max_decoding_message_size(4096);
    let open = |request| {
        let mut client = client.clone();
        async move { client.stream_batch(request).await }
    };
    let result = receive(open, v1::StreamBatchRequest::default(), &task(), 1, patience).await;
    serving.abort();
    let asked = std::mem::take(&mut told.0.lock().unwrap().asked);
    (asked, result)
}

#[tokio::test]
async fn a_broken_stream_is_resumed_where_it_broke() {
    let pieces = pieces();
    let rest = |from: usize, to: usize| pieces[from..to].to_vec();
    let answers = vec![
        (rest(0, 1), Some(Status::unavailable("the coordinator starts again"))),
        (rest(1, 3), None),
        (Vec::new(), Some(Status::data_loss("not this time"))),
        (rest(3, 5), Some(Status::unknown("the connection is gone"))),
        (rest(5, 6), None),
    ];
    let (asked, result) = received(answers, PATIENCE).await;
    assert_eq!(asked, [(0, 0), (3, 0), (8, 1), (8, 1), (8, 4)]);
    assert_eq!(result.unwrap(), taken(&task(), pieces).unwrap());
}

#[tokio::test]
async fn permanent_failures_are_not_retried() {
    type Expected = fn(&IntakeError) -> bool;
    let ends = |status| vec![(pieces()[..2].to_vec(), Some(status))];
    let mut contradiction = pieces();
    contradiction[2].sequences[0].tokens.clear();
    let mut large = pieces();
    large[1].prompts.push(v1::GroupPrompt { group_id: 0, tokens: vec![1 << 20; 4096], ..Default::default() });
    let cases: [(_, Expected); 5] = [
        (ends(Status::failed_precondition("dissolved")), |e| matches!(e, IntakeError::Withdrawn { step: 3 })),
        (ends(Status::not_found("who?")), |e| matches!(e, IntakeError::Unknown)),
        (ends(Status::out_of_range("too large")), |e| matches!(e, IntakeError::TooLarge { .. })),
        (vec![(contradiction, None)], |e| matches!(e, IntakeError::Malformed(_))),
        // Refused by the size limit of this side.
        (vec![(large, None)], |e| e.to_string().contains("cannot be delivered")),
    ];
    for (answers, expected) in cases {
        let (asked, result) = received(answers, PATIENCE).await;
        let error = result.unwrap_err();
        assert!(expected(&error), "{error:?}");
        assert_eq!(asked.len(), 1, "{error}");
    }
}

#[tokio::test]
async fn a_batch_that_is_less_than_was_announced_is_refused() {
    let answers = vec![(pieces()[..5].to_vec(), None), (Vec::new(), None)];
    let (asked, result) = received(answers, PATIENCE).await;
    assert_eq!(asked, [(0, 0), (8, 4)]);
    let error = result.unwrap_err();
    assert_eq!(error.to_string(), "batch of step 3: 8 of 8 entries and 4 of 5 sequences are all that comes");
}

#[tokio::test]
async fn a_silent_coordinator_is_abandoned() {
    let answers = (0..1000).map(|_| (Vec::new(), Some(Status::unavailable("no")))).collect();
    let (asked, result) = received(answers, Duration::from_millis(300)).await;
    assert!(matches!(result, Err(IntakeError::Silent { step: 3, .. })), "{result:?}");
    assert!(asked.len() > 1);
}
