//! A mixture of experts: a router sends every token to a few small feed-forward blocks, whose outputs are added up.
//!
//! Rows are sorted by expert, so each expert multiplies all of its tokens at once and computes no other. There is no loop over all
//! experts that masks tokens out, and none over tokens. An expert without tokens costs nothing and has a gradient of zero.
//!
//! Every sum has one order. The rows of an expert are in the order of the tokens; a token adds its experts up from the most
//! probable one to the least. Rejected was adding each expert's rows to the tokens as they become ready (`index_add`), which
//! rounds to 16 bits once for each expert, and on a GPU adds in any order. Replayed experts ([`Routing::Replay`]) are added up in the
//! order of their record, so that replaying a router's own choice changes no bit.
//!
//! Router logits are computed in float32 even when the model computes in bfloat16; transformers rounds them to bfloat16. Between 2 and 4
//! bfloat16 values are 0.016 apart, so logits tie, and the choice would depend on the last bit of hidden states, in which learner
//! and rollout differ.
// Legend: `T` tokens, `D` width, `E` experts, `K` experts of a token, `R = K T` rows, `F` width of an expert.

use std::ops::Range;
use std::rc::Rc;

use pacs_shape::{Activation, Experts as ExpertSizes, ROUTER, expert_parameter};
use pacs_torch::tch::{Kind, Tensor};
use pacs_torch::{Units, fixed_units, linear_float32, multiply_alone, one_thread_each, with_units};

use crate::layer::gradient_kind;
use crate::model::Weight;
use crate::ops::{add_weight_gradient, gate, gate_backward, linear, matmul, row_by_row};
use crate::routing::Routing;

/// Least sum of the probabilities of a token's experts that they are divided by. The most probable experts are far above it; those that
/// an earlier pass chose may have underflowed to zero, and zero by zero would be the log-prob of the token.
const LEAST_SUM: f64 = 1e-30;

/// Router and experts of a layer.
#[derive(Debug)]
pub(crate) struct Experts {
    /// Which of the layers with experts it is, from 0.
    mixture: usize,
    count: i64,
    per_token: i64,
    ffn: i64,
    renormalises: bool,
    activation: Activation,
    /// Weights of the choice, a row for each expert: `[E, D]`.
    router: Weight,
    /// Gates and ups, expert by expert: `[E 2 F, D]`.
    gate_up: Weight,
    /// `[E D, F]`.
    down: Weight,
}

/// What the backward needs of the forward, besides the input.
#[derive(Debug)]
pub(crate) struct ExpertsTrace {
    routes: Routes,
    /// `[R, 2 F]`, rows in the order of experts.
    gate_up: Tensor,
}

/// Where every token of a pass goes.
#[derive(Debug)]
struct Routes {
    /// Of every expert, `[T, E]`, float32 at least.
    probabilities: Tensor,
    /// The experts of each token, the most probable first unless they are replayed, `[T, K]` int64.
    choices: Tensor,
    /// What their outputs are multiplied with, `[T, K]`, float32 at least.
    weights: Tensor,
    order: Order,
}

impl Experts {
    /// `find` knows parameters by their names within the layer.
    pub(crate) fn new(
        sizes: &ExpertSizes,
        mixture: usize,
        activation: Activation,
        find: impl Fn(&str) -> Option<Weight>,
    ) -> Self {
        let get = |name: &str| find(name).expect("the layout has every parameter of its configuration");
        Self {
            mixture,
            count: sizes.count,
            per_token: sizes.per_token,
            ffn: sizes.ffn,
            renormalises: sizes.renormalises,
            activation,
            router: get(ROUTER),
            // All experts are one leaf, found by its first part.
            gate_up: get(&expert_parameter(0, "gate_proj")),
            down: get(&expert_parameter(0, "down_proj")),
        }
    }

    /// `[T, D]` from `input`, `[T, D]`, and what [`Experts::backward`] needs.
    pub(crate) fn forward(&self, input: Tensor, routing: &mut Routing<'_>) -> (Tensor, ExpertsTrace) {
        let (kind, width) = (input.kind(), input.size()[1]);
        let routes = self.routes(&input, routing);
        let order = &routes.order;
        let rows = input.index_select(0, &order.tokens);
        drop(input);
        let gate_up = order.multiply(&rows, 2 * self.ffn, |expert| self.gate_up_of(expert).tr());
        drop(rows);
        let gated = order.within(|| gate(self.activation, &gate_up));
        let outputs = order.multiply(&gated, width, |expert| self.down_of(expert).tr());
        let sum = order.summed(&outputs, Some(&routes.weights)).to_kind(kind);
        (sum, ExpertsTrace { routes, gate_up })
    }

    /// Gradient by `input`, `[T, D]`, from that by the output; adds the gradients of router and experts to `gradients`.
    pub(crate) fn backward(
        &self,
        trace: ExpertsTrace,
        by_output: Tensor,
        input: &Tensor,
        gradients: &Tensor,
    ) -> Tensor {
        let ExpertsTrace { routes, gate_up } = trace;
        let order = &routes.order;
        let kind = by_output.kind();
        let (wide, width) = (gradient_kind(kind), by_output.size()[1]);
        let weights = routes.weights.flatten(0, 1).index_select(0, &order.pairs).unsqueeze(1).to_kind(kind);

        let by_rows = by_output.index_select(0, &order.tokens);
        drop(by_output);
        // By what the experts gate, before weights. The gradient by a weight, which is that by the output times the output of
        // an expert, is also this times what was gated: so no output is computed again.
        let by_unweighted = order.multiply(&by_rows, self.ffn, |expert| self.down_of(expert));
        let (by_gate_up, gated) =
            order.within(|| gate_backward(self.activation, gate_up, &(&by_unweighted * &weights)));
        let by_weights = order.row_sums(by_unweighted.to_kind(wide) * gated.to_kind(wide));
        drop(by_unweighted);
        let weighted = gated * weights;
        order.add(self.down.slot(gradients), width, &by_rows, &weighted);
        drop((weighted, by_rows));
        order.add(self.gate_up.slot(gradients), 2 * self.ffn, &by_gate_up, &input.index_select(0, &order.tokens));
        let by_rows = order.multiply(&by_gate_up, width, |expert| self.gate_up_of(expert));
        drop(by_gate_up);
        let by_input = order.summed(&by_rows, None);
        drop(by_rows);

        let by_weights = by_weights.index_select(0, &order.places.flatten(0, 1)).view_as(&routes.weights);
        let by_scores = self.scores_backward(&routes, &by_weights);
        if let Some(mut slot) = self.router.slot(gradients) {
            add_weight_gradient(&mut slot, &by_scores, &input.to_kind(wide));
        }
        (by_input + matmul(&by_scores, &self.router.tensor.to_kind(wide))).to_kind(kind)
    }

    /// Scores of all experts, those of each token, which are the most probable ones unless they are replayed, and their weights.
    fn routes(&self, input: &Tensor, routing: &mut Routing<'_>) -> Routes {
        let (per_token, wide) = (self.per_token, gradient_kind(input.kind()));
        let is_narrow = matches!(input.kind(), Kind::BFloat16 | Kind::Half);
        let scores = if is_narrow && fixed_units().is_none() {
            linear_float32(input, &self.router.tensor)
        } else {
            linear(&input.to_kind(wide), &self.router.tensor.to_kind(wide), None)
        };
        let [probabilities, chosen, choices] = row_by_row(&scores, |scores| {
            let probabilities = scores.softmax(-1, wide);
            let (chosen, choices) = probabilities.topk(per_token, -1, true, true);
            [probabilities, chosen, choices]
        });
        let (chosen, choices, numbers) = match routing.replayed(self.mixture, &choices) {
            Some((choices, numbers)) => (probabilities.gather(1, &choices, false), choices, numbers),
            None => {
                // Waits for the device: how many rows an expert has decides which products there are.
                let numbers = Vec::<i64>::try_from(choices.flatten(0, 1)).expect("a vector of integers");
                (chosen, choices, numbers)
            }
        };
        let weights = if self.renormalises { &chosen / weight_sum(&chosen) } else { chosen };
        let order = Order::new(&choices, &numbers, self.count);
        routing.note(numbers);
        Routes { probabilities, choices, weights, order }
    }

    /// Gradient by the scores, `[T, E]`, from that by the weights, `[T, K]`.
    fn scores_backward(&self, routes: &Routes, by_weights: &Tensor) -> Tensor {
        let Routes { probabilities, choices, weights, .. } = routes;
        let chosen = probabilities.gather(1, choices, false);
        let by_chosen = match self.renormalises {
            true => (by_weights - sum_of_columns(&(by_weights * weights))) / weight_sum(&chosen),
            false => by_weights.shallow_clone(),
        };
        let by_chosen = by_chosen * chosen;
        // The choice itself has no gradient: experts that were not chosen have one through the softmax alone.
        (-(probabilities * sum_of_columns(&by_chosen))).scatter_add(1, choices, &by_chosen)
    }

    /// Gate and up projection of one expert: `[2 F, D]`.
    fn gate_up_of(&self, expert: i64) -> Tensor {
        part_of(&self.gate_up.tensor, expert, 2 * self.ffn)
    }

    /// Down projection of one expert: `[D, F]`.
    fn down_of(&self, expert: i64) -> Tensor {
        let rows = self.down.tensor.size()[0] / self.count;
        part_of(&self.down.tensor, expert, rows)
    }
}

/// The rows of a pass, one for each token and expert of it, sorted by expert.
#[derive(Debug)]
struct Order {
    /// Token of each row, `[R]`.
    tokens: Tensor,
    /// Place of each row among the choices of all tokens, `[R]`.
    pairs: Tensor,
    /// Row of each choice, `[T, K]`.
    places: Tensor,
    groups: Vec<Group>,
    /// The rows of a unit and an expert are a unit here, within [`with_units`].
    units: Option<Rc<Units>>,
}

/// The rows of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    expert: i64,
    rows: Range<usize>,
    /// How many rows each unit of the pass has here, without those that have none; one where there are no units.
    parts: Vec<usize>,
}

impl Order {
    /// `choices`: `[T, K]`; `chosen` holds the same in host memory.
    fn new(choices: &Tensor, chosen: &[i64], experts: i64) -> Self {
        let (tokens, per_token) = choices.size2().expect("choices are a matrix");
        let pass_units = fixed_units();
        let whole = || Units::new(&[tokens as usize]);
        let units = pass_units.as_deref().map_or_else(|| whole().ranges().to_vec(), |units| units.ranges().to_vec());
        let Sorted { pairs, places, groups } = sorted(chosen, per_token as usize, experts as usize, &units);
        let on_device = |indices: &[i64]| Tensor::from_slice(indices).to_device(choices.device());
        let of_rows: Vec<i64> = pairs.iter().map(|pair| pair / per_token).collect();
        let parts = || groups.iter().flat_map(|group| group.parts.iter().copied()).collect::<Vec<_>>();
        Self {
            tokens: on_device(&of_rows),
            pairs: on_device(&pairs),
            places: on_device(&places).view([tokens, per_token]),
            units: pass_units.map(|_| Rc::new(Units::new(&parts()))),
            groups,
        }
    }

    /// The product of each expert's rows with its matrix.
    ///
    /// `x`: `[R, I]`; `matrix`: `[I, O]` of an expert, `columns` being `O`. Returns `[R, O]`.
    fn multiply(&self, x: &Tensor, columns: i64, matrix: impl Fn(i64) -> Tensor) -> Tensor {
        let output = Tensor::empty([x.size()[0], columns], (x.kind(), x.device()));
        let of = |rows: Range<usize>| [x, &output].map(|all| rows_of(all, &rows));
        if self.units.is_none() {
            for group in &self.groups {
                let [x, output] = of(group.rows.clone());
                let _ = x.mm_out(&output, &matrix(group.expert));
            }
            return output;
        }
        let mut items = Vec::new();
        for group in &self.groups {
            let mut start = group.rows.start;
            for length in &group.parts {
                items.push((of(start..start + length), matrix(group.expert)));
                start += length;
            }
        }
        // One thread computes the rows of a unit and an expert, so that neither company nor threads decide how they are added up.
        one_thread_each(items, |([x, output], matrix): ([Tensor; 2], Tensor)| multiply_alone(x, &matrix, &output));
        output
    }

    /// Adds the gradient of each expert's matrix, `rows` of `slot`: `gradient` `[R, rows]` by its output, `input` it was applied to.
    fn add(&self, slot: Option<Tensor>, rows: i64, gradient: &Tensor, input: &Tensor) {
        let Some(slot) = slot else { return };
        for group in &self.groups {
            let mut slot = part_of(&slot, group.expert, rows);
            let [gradient, input] = [gradient, input].map(|all| rows_of(all, &group.rows));
            let mut add = || add_weight_gradient(&mut slot, &gradient, &input);
            match &self.units {
                Some(_) => with_units(&Rc::new(Units::new(&group.parts)), add),
                None => add(),
            }
        }
    }

    /// The rows of each token, `[R, D]`, added up from the first choice to the last, each times its weight, `[T, K]`, where there are
    /// weights. Returns `[T, D]`, float32 at least.
    fn summed(&self, rows: &Tensor, weights: Option<&Tensor>) -> Tensor {
        let wide = gradient_kind(rows.kind());
        let choice = |choice: i64| {
            let rows = rows.index_select(0, &self.places.select(1, choice)).to_kind(wide);
            match weights {
                Some(weights) => rows * weights.narrow(1, choice, 1),
                None => rows,
            }
        };
        let mut sum = choice(0);
        for next in 1..self.places.size()[1] {
            let _ = sum.g_add_(&choice(next));
        }
        sum
    }

    /// Sum of each row, `[R]`.
    fn row_sums(&self, rows: Tensor) -> Tensor {
        let kind = rows.kind();
        let [sums] = self.within(|| row_by_row(&rows, |rows| [rows.sum_dim_intlist(-1, false, kind)]));
        sums
    }

    /// Does `work` on rows in the order of experts.
    fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        match &self.units {
            Some(units) => with_units(units, work),
            None => work(),
        }
    }
}

/// The choices of all tokens, sorted by expert.
#[derive(Debug, PartialEq, Eq)]
struct Sorted {
    /// The choice that each row stands for.
    pairs: Vec<i64>,
    /// The row of each choice.
    places: Vec<i64>,
    groups: Vec<Group>,
}

/// Counts and places: rows of one expert stay in the order of the tokens, and so of their units.
fn sorted(choices: &[i64], per_token: usize, experts: usize, units: &[Range<usize>]) -> Sorted {
    let mut counts = vec![vec![0usize; units.len()]; experts];
    for (unit, tokens) in units.iter().enumerate() {
        for expert in &choices[tokens.start * per_token..tokens.end * per_token] {
            counts[*expert as usize][unit] += 1;
        }
    }
    let (mut groups, mut next, mut end) = (Vec::new(), Vec::with_capacity(experts), 0);
    for (expert, counts) in (0i64..).zip(counts) {
        let rows = end..end + counts.iter().sum::<usize>();
        next.push(rows.start);
        end = rows.end;
        if !rows.is_empty() {
            groups.push(Group { expert, rows, parts: counts.into_iter().filter(|count| *count > 0).collect() });
        }
    }
    let (mut pairs, mut places) = (vec![0; choices.len()], Vec::with_capacity(choices.len()));
    for (pair, expert) in (0i64..).zip(choices) {
        let row = &mut next[*expert as usize];
        pairs[*row] = pair;
        places.push(*row as i64);
        *row += 1;
    }
    Sorted { pairs, places, groups }
}

/// What probabilities of the chosen experts, `[T, K]`, are divided by, `[T, 1]`.
fn weight_sum(chosen: &Tensor) -> Tensor {
    sum_of_columns(chosen).clamp_min(LEAST_SUM)
}

/// Sum of a few columns, `[T, 1]`, from the first to the last: additions alone, which are the same wherever a row stands.
fn sum_of_columns(x: &Tensor) -> Tensor {
    let first = x.narrow(1, 0, 1).copy();
    (1..x.size()[1]).fold(first, |sum, column| sum + x.narrow(1, column, 1))
}

fn rows_of(all: &Tensor, rows: &Range<usize>) -> Tensor {
    all.narrow(0, rows.start as i64, rows.len() as i64)
}

/// The matrix of an expert among those of all, `rows` rows each.
fn part_of(all: &Tensor, expert: i64, rows: i64) -> Tensor {
    all.narrow(0, expert * rows, rows)
}

#[cfg(test)]
mod tests {
    use pacs_shape::RouteShape;
    use pacs_torch::tch::{Device, no_grad, with_grad};

    use super::*;
    use crate::routing::{RecordedRoutes, Replay, RouteLog};

    const WIDTH: i64 = 12;
    const FFN: i64 = 7;

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Double, Device::Cpu)).to_kind(kind)
    }

    fn mixture(count: i64, per_token: i64, renormalises: bool) -> ExpertSizes {
        ExpertSizes { count, per_token, ffn: FFN, renormalises, dense_layers: Vec::new() }
    }

    /// Router, gates and ups, and ways back down in one buffer, as shapes and first elements.
    fn leaves(count: i64) -> [([i64; 2], usize); 3] {
        let shapes = [[count, WIDTH], [count * 2 * FFN, WIDTH], [count * WIDTH, FFN]];
        let mut end = 0;
        shapes.map(|shape| {
            let first = end;
            end += shape.iter().product::<i64>() as usize;
            (shape, first)
        })
    }

    fn parameters(count: i64) -> i64 {
        count * WIDTH * (1 + 3 * FFN)
    }

    fn views(flat: &Tensor, count: i64) -> [Tensor; 3] {
        leaves(count).map(|(shape, first)| flat.narrow(0, first as i64, shape[0] * shape[1]).view(shape))
    }

    fn experts(flat: &Tensor, sizes: &ExpertSizes, activation: Activation) -> Experts {
        let find = |name: &str| {
            let names = [ROUTER.to_owned(), expert_parameter(0, "gate_proj"), expert_parameter(0, "down_proj")];
            let which = names.iter().position(|known| known == name)?;
            let tensor = views(flat, sizes.count)[which].shallow_clone();
            Some(Weight::new(tensor, Some(leaves(sizes.count)[which].1)))
        };
        Experts::new(sizes, 0, activation, find)
    }

    /// Records `choices`, `[T, K]`, as those of a model with one such layer.
    fn recorded(choices: &Tensor, sizes: &ExpertSizes) -> Rc<RecordedRoutes> {
        let shape = RouteShape::new(1, sizes).unwrap();
        let mut bytes = Vec::new();
        shape.write(&Vec::<i64>::try_from(choices.flatten(0, 1)).unwrap(), &mut bytes);
        Rc::new(RecordedRoutes::new(shape, bytes))
    }

    /// Every expert computes every token, and most of that is multiplied by zero. `choices` take the place of the most probable experts.
    fn densely(
        x: &Tensor,
        flat: &Tensor,
        sizes: &ExpertSizes,
        activation: Activation,
        choices: Option<&Tensor>,
    ) -> Tensor {
        let [router, gate_up, down] = views(flat, sizes.count);
        let probabilities = x.matmul(&router.tr()).softmax(-1, Kind::Double);
        let choices = match choices {
            Some(choices) => choices.shallow_clone(),
            None => probabilities.topk(sizes.per_token, -1, true, true).1,
        };
        let chosen = probabilities.gather(1, &choices, false);
        let weights = match sizes.renormalises {
            true => &chosen / chosen.sum_dim_intlist(-1, true, Kind::Double),
            false => chosen,
        };
        let weights =
            Tensor::zeros([x.size()[0], sizes.count], (Kind::Double, Device::Cpu)).scatter(1, &choices, &weights);
        let of_expert = |expert: i64| {
            let gate_up = x.matmul(&part_of(&gate_up, expert, 2 * FFN).tr());
            let [gate, up] = [0, FFN].map(|first| gate_up.narrow(1, first, FFN));
            let gate = if activation == Activation::Silu { gate.silu() } else { gate.gelu("tanh") };
            (gate * up).matmul(&part_of(&down, expert, WIDTH).tr()) * weights.narrow(1, expert, 1)
        };
        (0..sizes.count).map(of_expert).fold(x.zeros_like(), |sum, output| sum + output)
    }

    fn furthest(a: &Tensor, b: &Tensor) -> f64 {
        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
    }

    /// Outputs, gradients by the input, by the router through weights and softmax, and by the experts, some without a token: of the most
    /// probable experts, and of any others that are replayed.
    #[test]
    fn outputs_and_gradients_are_those_of_autograd() {
        pacs_torch::tch::manual_seed(21);
        for (tokens, count, per_token) in [(17, 5, 2), (3, 8, 2), (9, 4, 1), (11, 3, 3), (1, 6, 3)] {
            for (renormalises, replays) in [(false, false), (true, false), (false, true), (true, true)] {
                for activation in [Activation::Silu, Activation::GeluTanh] {
                    let sizes = mixture(count, per_token, renormalises);
                    let [x, by_output] = [0, 1].map(|_| random(&[tokens, WIDTH], Kind::Double));
                    let flat = random(&[parameters(count)], Kind::Double);
                    let any = || random(&[tokens, count], Kind::Double).topk(per_token, -1, true, true).1;
                    let choices = replays.then(any);
                    let routes = choices.as_ref().map(|choices| recorded(choices, &sizes));
                    let (leaf, input) = (flat.copy().set_requires_grad(true), x.copy().set_requires_grad(true));
                    let expected = with_grad(|| densely(&input, &leaf, &sizes, activation, choices.as_ref()));
                    with_grad(|| (&expected * &by_output).sum(Kind::Double)).backward();

                    let experts = experts(&flat, &sizes, activation);
                    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
                        let flat = flat.to_kind(kind);
                        let experts = match kind {
                            Kind::Double => &experts,
                            _ => &self::experts(&flat, &sizes, activation),
                        };
                        let gradients = Tensor::zeros([parameters(count)], (kind, Device::Cpu));
                        let mut replay = routes.clone().map(Replay::new);
                        let (output, by_input) = no_grad(|| {
                            let mut routing = Routing::replaying(replay.as_mut());
                            let (output, trace) = experts.forward(x.to_kind(kind), &mut routing);
                            (output, experts.backward(trace, by_output.to_kind(kind), &x.to_kind(kind), &gradients))
                        });
                        let case = format!(
                            "{tokens} tokens, {per_token} of {count}, {renormalises}, {replays}, {activation:?}, {kind:?}"
                        );
                        let close = |found: &Tensor, expected: &Tensor| {
                            let largest = expected.abs().max().double_value(&[]);
                            furthest(found, expected) < tolerance * (1.0 + largest)
                        };
                        assert!(close(&output, &expected), "{case}: outputs");
                        assert!(close(&by_input, &input.grad()), "{case}: by the input");
                        assert!(close(&gradients, &leaf.grad()), "{case}: by the parameters");
                    }
                }
            }
        }
    }

    #[test]
    fn routes_in_bfloat16_are_those_of_the_same_numbers_in_float32() {
        pacs_torch::tch::manual_seed(22);
        let sizes = mixture(6, 2, true);
        let (x, flat) = (random(&[40, WIDTH], Kind::BFloat16), random(&[parameters(6)], Kind::BFloat16));
        let narrow = experts(&flat, &sizes, Activation::Silu);
        let wide_flat = flat.to_kind(Kind::Float);
        let wide = experts(&wide_flat, &sizes, Activation::Silu);
        let (x, wide_x) = (x.shallow_clone(), x.to_kind(Kind::Float));
        let [(narrow, routes), (wide, expected)] = [(&narrow, &x), (&wide, &wide_x)]
            .map(|(experts, x)| no_grad(|| experts.forward(x.shallow_clone(), &mut Routing::Own)));
        assert!(routes.routes.choices.equal(&expected.routes.choices), "scores are float32 in both");
        assert_eq!((narrow.kind(), routes.routes.weights.kind()), (Kind::BFloat16, Kind::Float));
        assert!(furthest(&narrow, &wide) < 0.02 * wide.abs().max().double_value(&[]));
    }

    /// Output, gradient by the input, and that by the parameters.
    fn passed(experts: &Experts, x: &Tensor, by_output: &Tensor, count: i64, routing: &mut Routing<'_>) -> [Tensor; 3] {
        let sums = if fixed_units().is_some() { Kind::Int64 } else { gradient_kind(x.kind()) };
        let gradients = Tensor::zeros([parameters(count)], (sums, Device::Cpu));
        no_grad(|| {
            let (output, trace) = experts.forward(x.copy(), routing);
            let by_input = experts.backward(trace, by_output.copy(), x, &gradients);
            [output, by_input, gradients]
        })
    }

    #[test]
    fn a_routers_own_choice_replayed_changes_no_bit() {
        pacs_torch::tch::manual_seed(24);
        for (kind, renormalises) in [(Kind::Float, true), (Kind::BFloat16, true), (Kind::Float, false)] {
            let sizes = mixture(6, 3, renormalises);
            let shape = RouteShape::new(1, &sizes).unwrap();
            let [x, by_output] = [0, 1].map(|_| random(&[50, WIDTH], kind));
            let flat = random(&[parameters(6)], kind);
            let experts = experts(&flat, &sizes, Activation::Silu);
            let compare = || {
                let mut log = RouteLog::new(shape);
                let own = passed(&experts, &x, &by_output, 6, &mut Routing::Record(&mut log));
                let mut bytes = Vec::new();
                log.append(0..50, &mut bytes);
                assert_eq!(shape.check(&bytes, 50), Ok(()));
                let mut replay = Replay::new(Rc::new(RecordedRoutes::new(shape, bytes)));
                let again = passed(&experts, &x, &by_output, 6, &mut Routing::Replay(&mut replay));
                let same = own.iter().zip(&again).all(|(own, again)| own.equal(again));
                assert!(same, "{kind:?}, {renormalises}, units: {}", fixed_units().is_some());
                let rerouted = replay.rerouted().expect("a layer has computed");
                assert_eq!((rerouted.size(), rerouted.sum(Kind::Int64).int64_value(&[])), (vec![50], 0));
            };
            compare();
            with_units(&Rc::new(Units::new(&[20, 1, 29])), compare);
        }
    }

    #[test]
    fn tokens_that_a_router_would_have_sent_elsewhere_are_counted() {
        pacs_torch::tch::manual_seed(25);
        let sizes = mixture(5, 2, true);
        let (x, flat) = (random(&[4, WIDTH], Kind::Float), random(&[parameters(5)], Kind::Float));
        let experts = experts(&flat, &sizes, Activation::Silu);
        let [router, ..] = views(&flat, 5);
        let (_, best) = x.linear(&router, None::<&Tensor>).topk(3, -1, true, true);
        let best = Vec::<Vec<i64>>::try_from(best).unwrap();
        // The order of experts decides how they are added up, and not which they are.
        let chosen =
            [[best[0][0], best[0][1]], [best[1][1], best[1][0]], [best[2][0], best[2][2]], [best[3][2], best[3][1]]];
        let choices = Tensor::from_slice(&chosen.concat()).view([4, 2]);
        let mut replay = Replay::new(recorded(&choices, &sizes));
        let (_, trace) = no_grad(|| experts.forward(x.shallow_clone(), &mut Routing::Replay(&mut replay)));
        assert!(trace.routes.choices.equal(&choices));
        let rerouted = Vec::<i64>::try_from(replay.rerouted().expect("a layer has computed")).unwrap();
        assert_eq!(rerouted, [0, 0, 1, 1]);
    }

    /// Weights of a later version may give experts that an earlier one chose a probability of zero.
    #[test]
    fn experts_without_any_probability_are_finite() {
        pacs_torch::tch::manual_seed(26);
        for renormalises in [false, true] {
            let sizes = mixture(4, 2, renormalises);
            let [x, by_output] = [0, 1].map(|_| random(&[3, WIDTH], Kind::Float).abs());
            let flat = random(&[parameters(4)], Kind::Float);
            // Scores of the first expert are hundreds above those of the others.
            let [mut router, ..] = views(&flat, 4);
            let _ = router.zero_();
            let _ = router.get(0).fill_(1000.0);
            let choices = Tensor::from_slice(&[1i64, 2, 2, 3, 3, 1]).view([3, 2]);
            let mut replay = Replay::new(recorded(&choices, &sizes));
            let experts = experts(&flat, &sizes, Activation::Silu);
            let passed = passed(&experts, &x, &by_output, 4, &mut Routing::Replay(&mut replay));
            assert!(passed.iter().all(|x| x.isfinite().all().equal(&Tensor::from(true))), "{renormalises}");
        }
    }

    #[test]
    fn rows_of_an_expert_are_in_the_order_of_the_tokens() {
        // Four tokens in two units, two experts per token; expert 2 gets no token.
        let found = sorted(&[3, 0, 0, 1, 3, 1, 0, 3], 2, 4, &[0..1, 1..4]);
        assert_eq!(found.pairs, [1, 2, 6, 3, 5, 0, 4, 7]);
        assert_eq!(found.places, [5, 0, 1, 3, 6, 4, 2, 7]);
        let group = |expert, rows, parts: &[usize]| Group { expert, rows, parts: parts.to_vec() };
        assert_eq!(found.groups, [group(0, 0..3, &[1, 2]), group(1, 3..5, &[2]), group(3, 5..8, &[1, 2])]);
    }

    /// A unit gives the same bits whichever other units share its pass, and with any number of threads.
    #[test]
    fn a_unit_is_bit_identical_alone_and_in_company() {
        pacs_torch::tch::manual_seed(23);
        let threads = pacs_torch::tch::get_num_threads();
        let sizes = mixture(6, 2, false);
        for kind in [Kind::Float, Kind::BFloat16] {
            let (x, by_output) = (random(&[190, WIDTH], kind), random(&[190, WIDTH], kind));
            let flat = random(&[parameters(6)], kind);
            let experts = experts(&flat, &sizes, Activation::Silu);
            let sums = || Tensor::zeros([parameters(6)], (Kind::Int64, Device::Cpu));
            let run = |lengths: &[usize], start: i64, length: i64, sums: &Tensor| {
                let [x, by_output] = [&x, &by_output].map(|all| all.narrow(0, start, length).copy());
                with_units(&Rc::new(Units::new(lengths)), || {
                    no_grad(|| {
                        let (output, trace) = experts.forward(x.shallow_clone(), &mut Routing::Own);
                        Tensor::cat(&[output, experts.backward(trace, by_output, &x, sums)], 1)
                    })
                })
            };
            let (apart, together) = (sums(), sums());
            let mut alone = Vec::new();
            for (start, length, threads) in [(0, 150, 1), (150, 1, 2), (151, 39, 3)] {
                pacs_torch::tch::set_num_threads(threads);
                alone.push(run(&[length as usize], start, length, &apart));
            }
            pacs_torch::tch::set_num_threads(2);
            let company = run(&[150, 1, 39], 0, 190, &together);
            assert!(Tensor::cat(&alone, 0).equal(&company), "{kind:?}");
            assert!(apart.equal(&together) && together.abs().max().int64_value(&[]) > 0, "{kind:?}");
        }
        pacs_torch::tch::set_num_threads(threads);
    }
}
