//! Who chooses the experts of a token: the routers of the pass, or those of an earlier pass that recorded them.
//!
//! Replay is that of R3 (Ma et al. 2025, "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
//! arXiv:2510.11370): the recorded experts take the place of the most probable ones and nothing else does. Their weights are those of
//! the pass's own scores, so that routers keep their gradient.
// Legend: `T` tokens, `K` experts of a token.

use std::ops::Range;
use std::rc::Rc;

use pacs_shape::RouteShape;
use pacs_torch::tch::{Kind, Tensor};

/// Who chooses the experts of the tokens of a forward pass. Dense layers do not ask.
#[derive(Debug)]
pub enum Routing<'a> {
    /// The router of each layer.
    Own,
    /// The same, and the choices are recorded.
    Record(&'a mut RouteLog),
    /// An earlier pass.
    Replay(&'a mut Replay),
}

impl<'a> Routing<'a> {
    /// Replays routes where there are any.
    #[must_use]
    pub fn replaying(replay: Option<&'a mut Replay>) -> Self {
        replay.map_or(Self::Own, Self::Replay)
    }

    /// The recorded experts in layer `mixture` of those with experts: `[T, K]` int64, and the same in host memory. `None` where
    /// they are `own`, the most probable ones, `[T, K]`.
    pub(crate) fn replayed(&mut self, mixture: usize, own: &Tensor) -> Option<(Tensor, Vec<i64>)> {
        match self {
            Self::Own | Self::Record(_) => None,
            Self::Replay(replay) => Some(replay.experts(mixture, own)),
        }
    }

    /// Takes note of the experts of the next layer that has some, `K` for each token.
    pub(crate) fn note(&mut self, experts: Vec<i64>) {
        if let Self::Record(log) = self {
            log.mixtures.push(experts);
        }
    }

    /// What a computation of the same pass again has to replay.
    pub(crate) fn routes(&self) -> Option<Rc<RecordedRoutes>> {
        match self {
            Self::Own | Self::Record(_) => None,
            Self::Replay(replay) => Some(Rc::clone(&replay.routes)),
        }
    }
}

/// The experts that a pass has chosen, by layer.
#[derive(Debug)]
pub struct RouteLog {
    shape: RouteShape,
    /// `T K` numbers for each layer with experts.
    mixtures: Vec<Vec<i64>>,
}

impl RouteLog {
    /// A log for one pass of a model of this shape.
    #[must_use]
    pub fn new(shape: RouteShape) -> Self {
        Self { shape, mixtures: Vec::with_capacity(shape.mixtures()) }
    }

    /// Appends the routes of some tokens of the pass to `bytes`.
    ///
    /// # Panics
    /// When the pass had fewer tokens.
    pub fn append(&self, tokens: Range<usize>, bytes: &mut Vec<u8>) {
        let per_token = self.shape.per_token();
        for token in tokens {
            for experts in &self.mixtures {
                self.shape.write(&experts[token * per_token..][..per_token], bytes);
            }
        }
    }
}

/// The routes of all tokens of a pass, in the order of its rows.
#[derive(Debug)]
pub struct RecordedRoutes {
    shape: RouteShape,
    bytes: Vec<u8>,
}

impl RecordedRoutes {
    /// Routes in the layout of `shape`, which [`RouteShape::check_range`] accepts.
    #[must_use]
    pub fn new(shape: RouteShape, bytes: Vec<u8>) -> Self {
        Self { shape, bytes }
    }

    /// Layers that have routes.
    #[must_use]
    pub fn mixtures(&self) -> usize {
        self.shape.mixtures()
    }
}

/// One forward pass with recorded routes, and how they compare with the choices of its own routers.
#[derive(Debug)]
pub struct Replay {
    routes: Rc<RecordedRoutes>,
    counts: bool,
    /// `[T]` int64; `None` before the first layer with experts, and where nothing is counted.
    rerouted: Option<Tensor>,
}

impl Replay {
    /// A pass with these routes.
    #[must_use]
    pub fn new(routes: Rc<RecordedRoutes>) -> Self {
        Self { routes, counts: true, rerouted: None }
    }

    /// A part of that pass once more, which counts nothing.
    pub(crate) fn again(routes: &Rc<RecordedRoutes>) -> Self {
        Self { routes: Rc::clone(routes), counts: false, rerouted: None }
    }

    /// For each token the number of layers whose router would have chosen another set of experts, `[T]` int64; `None` before the pass.
    ///
    /// A router sees what the replayed experts of earlier layers computed, so a difference in one layer causes none in the next.
    #[must_use]
    pub fn rerouted(&self) -> Option<&Tensor> {
        self.rerouted.as_ref()
    }

    fn experts(&mut self, mixture: usize, own: &Tensor) -> (Tensor, Vec<i64>) {
        let numbers = self.routes.shape.read(&self.routes.bytes, mixture);
        assert_eq!(numbers.len(), own.numel(), "the routes are those of other tokens");
        let experts = Tensor::from_slice(&numbers).view_as(own).to_device(own.device());
        if self.counts {
            let sorted = |experts: &Tensor| experts.sort(1, false).0;
            let differs = sorted(&experts).not_equal_tensor(&sorted(own)).any_dim(1, false).to_kind(Kind::Int64);
            self.rerouted = Some(match self.rerouted.take() {
                Some(before) => before + differs,
                None => differs,
            });
        }
        (experts, numbers)
    }
}
