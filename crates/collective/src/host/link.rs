use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::group::GroupConfig;
use super::socket::{Socket, is_passing};
use super::wait::wait;
use crate::error::Fault;
use crate::{ErrorKind, Operation};

/// Longest message of a length that the receiver does not know beforehand (bytes).
pub(crate) const FREE_LENGTH_LIMIT: usize = 1 << 30;

/// Connections to the two neighbours. Data flows one way: out to the next rank, in from the previous one.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) next: Socket,
    pub(crate) previous: Socket,
    next_rank: usize,
    previous_rank: usize,
}

/// One call of an operation. Its messages carry operation, sequence and elements, so that ranks notice when they are
/// out of step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    /// Number of the call on this communicator.
    pub(crate) sequence: u64,
    /// Elements of the buffer, equal on every rank; 0 for operations without one.
    pub(crate) elements: usize,
    pub(crate) deadline: Instant,
    pub(crate) timeout: Duration,
}

/// Destination of an incoming message.
pub(crate) enum Receive<'a> {
    Nothing,
    /// A message of exactly this length.
    Bytes(&'a mut [u8]),
    /// A message of any length up to the limit.
    Numbers(&'a mut Vec<f64>),
}

impl Link {
    pub(crate) fn new(group: &GroupConfig, next: Socket, previous: Socket) -> Self {
        Self { next, previous, next_rank: group.next(), previous_rank: group.previous() }
    }

    /// Sends to the next rank and receives from the previous one concurrently. A ring of ranks that all send first
    /// therefore cannot deadlock, whatever the message size.
    pub(crate) fn exchange(&self, call: &Call, send: Option<&[u8]>, receive: Receive<'_>) -> Result<(), Fault> {
        let mut outbox = send.map(|payload| Outbox::new(call, payload));
        let mut inbox = Inbox::new(call, receive);
        loop {
            let sent = match &mut outbox {
                Some(outbox) => outbox.push(&self.next).map_err(|kind| Fault::with(self.next_rank, kind))?,
                None => false,
            };
            let received = inbox.pull(&self.previous).map_err(|kind| Fault::with(self.previous_rank, kind))?;
            let sending = outbox.as_ref().is_some_and(|outbox| !outbox.is_done());
            let receiving = !inbox.is_done();
            if !sending && !receiving {
                return Ok(());
            }
            if Instant::now() >= call.deadline {
                return Err(self.timed_out(call, receiving));
            }
            if !sent && !received {
                self.wait(call, sending, receiving).map_err(|error| Fault::own(ErrorKind::Io(error)))?;
            }
        }
    }

    /// Returns a neighbour whose connection is closed.
    pub(crate) fn lost_neighbour(&self) -> Option<usize> {
        let closed = |socket: &Socket| match socket.stream().peek(&mut [0]) {
            // Pending data belongs to the next call.
            Ok(length) => length == 0,
            Err(error) => !is_passing(&error),
        };
        let neighbours = [(&self.next, self.next_rank), (&self.previous, self.previous_rank)];
        neighbours.into_iter().find(|(socket, _)| closed(socket)).map(|(_, rank)| rank)
    }

    fn wait(&self, call: &Call, sending: bool, receiving: bool) -> io::Result<()> {
        // The next rank never sends, so its socket becomes readable only when that rank is gone.
        let outgoing = sending.then(|| (self.next.stream().as_fd(), PollFlags::POLLOUT | PollFlags::POLLIN));
        let incoming = receiving.then(|| (self.previous.stream().as_fd(), PollFlags::POLLIN));
        let sockets: Vec<_> = outgoing.into_iter().chain(incoming).collect();
        wait(&sockets, call.deadline)
    }

    fn timed_out(&self, call: &Call, receiving: bool) -> Fault {
        let (peer, waiting_for) =
            if receiving { (self.previous_rank, "its data") } else { (self.next_rank, "it to take data") };
        Fault::with(peer, ErrorKind::TimedOut { timeout: call.timeout, waiting_for: waiting_for.to_owned() })
    }
}

const HEADER_BYTES: usize = 25;

/// Header of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    operation: u8,
    sequence: u64,
    elements: u64,
    payload_bytes: u64,
}

impl Header {
    fn new(call: &Call, payload_bytes: usize) -> Self {
        let &Call { operation, sequence, elements, .. } = call;
        Self { operation: operation as u8, sequence, elements: elements as u64, payload_bytes: payload_bytes as u64 }
    }

    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [self.operation; HEADER_BYTES];
        bytes[1..9].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[9..17].copy_from_slice(&self.elements.to_le_bytes());
        bytes[17..].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Self { operation: bytes[0], sequence: number(1), elements: number(9), payload_bytes: number(17) }
    }

    fn describe(self) -> String {
        let Self { operation, sequence, elements, payload_bytes } = self;
        match Operation::ALL.get(usize::from(operation)) {
            Some(operation) => {
                format!("call {sequence}, {operation} of {elements} elements, message of {payload_bytes} bytes")
            }
            None => format!("an unknown operation (code {operation})"),
        }
    }
}

/// An outgoing message.
struct Outbox<'a> {
    header: [u8; HEADER_BYTES],
    payload: &'a [u8],
    /// Bytes of header and payload that the socket has accepted.
    sent: usize,
    /// Whether all bytes have been handed to TCP, those of TLS included.
    flushed: bool,
}

impl<'a> Outbox<'a> {
    fn new(call: &Call, payload: &'a [u8]) -> Self {
        Self { header: Header::new(call, payload.len()).encode(), payload, sent: 0, flushed: false }
    }

    fn is_done(&self) -> bool {
        self.flushed
    }

    /// Sends as much as the socket accepts; returns whether there was progress.
    fn push(&mut self, socket: &Socket) -> Result<bool, ErrorKind> {
        if self.is_done() {
            return Ok(false);
        }
        let pushed = if self.sent < HEADER_BYTES + self.payload.len() {
            let header = &self.header[self.sent.min(HEADER_BYTES)..];
            let payload = &self.payload[self.sent.saturating_sub(HEADER_BYTES)..];
            socket.write(&[IoSlice::new(header), IoSlice::new(payload)])
        } else {
            socket.flush().map(|()| 0)
        };
        match pushed {
            Ok(written) => {
                self.flushed = self.sent == HEADER_BYTES + self.payload.len();
                self.sent += written;
                Ok(written > 0 || self.flushed)
            }
            Err(error) if is_passing(&error) => match socket.is_closed() {
                Ok(true) => Err(ErrorKind::PeerClosed),
                Ok(false) => Ok(false),
                Err(error) => Err(broken(error)),
            },
            Err(error) => Err(broken(error)),
        }
    }
}

/// An incoming message.
struct Inbox<'a> {
    expected: Header,
    header: [u8; HEADER_BYTES],
    target: Receive<'a>,
    received: usize,
}

impl<'a> Inbox<'a> {
    fn new(call: &Call, target: Receive<'a>) -> Self {
        let length = if let Receive::Bytes(bytes) = &target { bytes.len() } else { 0 };
        Self { expected: Header::new(call, length), header: [0; HEADER_BYTES], target, received: 0 }
    }

    fn is_done(&self) -> bool {
        match &self.target {
            Receive::Nothing => true,
            Receive::Bytes(bytes) => self.received == HEADER_BYTES + bytes.len(),
            // The vector gets its length when the header has arrived.
            Receive::Numbers(numbers) => self.received == HEADER_BYTES + size_of_val(numbers.as_slice()),
        }
    }

    /// Receives what is available; returns whether there was progress.
    fn pull(&mut self, socket: &Socket) -> Result<bool, ErrorKind> {
        if self.is_done() {
            return Ok(false);
        }
        let rest = match (&mut self.target, self.received.checked_sub(HEADER_BYTES)) {
            (_, None) => &mut self.header[self.received..],
            (Receive::Nothing, Some(_)) => &mut [],
            (Receive::Bytes(bytes), Some(filled)) => &mut bytes[filled..],
            (Receive::Numbers(numbers), Some(filled)) => &mut bytemuck::cast_slice_mut(numbers)[filled..],
        };
        let read = match socket.read(rest) {
            Ok(0) => return Err(ErrorKind::PeerClosed),
            Ok(read) => read,
            Err(error) if is_passing(&error) => return Ok(false),
            Err(error) => return Err(broken(error)),
        };
        let had_header = self.received >= HEADER_BYTES;
        self.received += read;
        if !had_header && self.received >= HEADER_BYTES {
            self.open()?;
        }
        Ok(true)
    }

    /// Checks the header, and allocates room for what it announces.
    fn open(&mut self) -> Result<(), ErrorKind> {
        let theirs = Header::decode(&self.header);
        let mut ours = self.expected;
        if let Receive::Numbers(numbers) = &mut self.target {
            let length = usize::try_from(theirs.payload_bytes).unwrap_or(usize::MAX);
            if length <= FREE_LENGTH_LIMIT && length.is_multiple_of(size_of::<f64>()) {
                numbers.resize(length / size_of::<f64>(), 0.0);
                ours.payload_bytes = theirs.payload_bytes;
            }
        }
        if ours == theirs {
            return Ok(());
        }
        Err(ErrorKind::OutOfStep { ours: ours.describe(), theirs: theirs.describe() })
    }
}

fn broken(error: io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => {
            ErrorKind::PeerClosed
        }
        _ => ErrorKind::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn operation_codes_are_positions() {
        for (code, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, code);
        }
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(operation: u8, sequence: u64, elements: u64, payload_bytes: u64) {
            let header = Header { operation, sequence, elements, payload_bytes };
            prop_assert_eq!(Header::decode(&header.encode()), header);
        }
    }
}
