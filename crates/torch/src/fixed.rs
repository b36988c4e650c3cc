//! Computing in an order that depends on the data alone: not on how many threads there are, and not on what else is computed
//! in the same pass.
//!
//! A matrix product of libtorch is cut by its size and by the threads that are there, and each cut adds up in another order.
//! Here it is cut into tiles of fixed places within units, and each tile is computed by one thread. A unit is what is never
//! divided: rows that are computed together wherever they are computed. Within a parallel region of OpenMP, libtorch and the
//! libraries beneath it compute with the calling thread alone, so many tiles are computed at once.
// Legend: `T` rows of a pass, `K` and `O` width of the input and output of a matrix product.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use half::bf16;
use tch::{Kind, Tensor, no_grad};

use crate::element::Element;
use crate::exact::{add_exact, note_bound};
use crate::parallel;
use crate::view::{ViewError, i64_mut};

/// Rows of a tile of a product.
const TILE_ROWS: usize = 128;
/// Columns of a tile of a product with few rows and many columns.
const TILE_COLUMNS: usize = 2048;
/// Boundary that libtorch's own memory begins at (bytes).
const ALIGNMENT: usize = 64;

/// The units of a pass: its rows, one unit after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    ranges: Vec<Range<usize>>,
    scored: Vec<Range<usize>>,
}

impl Units {
    /// Units of so many rows each.
    #[must_use]
    pub fn new(lengths: &[usize]) -> Self {
        Self::with_scored(lengths, &[])
    }

    /// The same, of which so many rows each are scored. These rows, taken out, are a tensor of their own.
    #[must_use]
    pub fn with_scored(lengths: &[usize], scored: &[usize]) -> Self {
        let ranges = |lengths: &[usize]| {
            let ranges = lengths.iter().scan(0, |end, length| {
                let start = *end;
                *end += length;
                Some(start..*end)
            });
            ranges.collect()
        };
        Self { ranges: ranges(lengths), scored: ranges(scored) }
    }

    /// Where the scored rows of each unit lie among all scored rows.
    #[must_use]
    pub fn scored(&self) -> &[Range<usize>] {
        &self.scored
    }

    /// Where each unit lies.
    #[must_use]
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Total number of rows over all units.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.ranges.last().map_or(0, |last| last.end)
    }

    /// Cuts the units into parts of at most `rows` rows, from the start of each.
    fn tiles(&self, rows: usize) -> Vec<Range<usize>> {
        let of = |unit: &Range<usize>| {
            let end = unit.end;
            unit.clone().step_by(rows).map(move |start| start..(start + rows).min(end)).collect::<Vec<_>>()
        };
        self.ranges.iter().flat_map(of).collect()
    }
}

thread_local! {
    static UNITS: RefCell<Option<Rc<Units>>> = const { RefCell::new(None) };
}

/// The units that this thread computes in, within [`with_units`].
#[must_use]
pub fn fixed_units() -> Option<Rc<Units>> {
    UNITS.with_borrow(Clone::clone)
}

/// Does `work`, in which models compute every unit as if it were alone.
pub fn with_units<T>(units: &Rc<Units>, work: impl FnOnce() -> T) -> T {
    /// Sets the units back, also when `work` panics.
    struct Before(Option<Rc<Units>>);
    impl Drop for Before {
        fn drop(&mut self) {
            UNITS.set(self.0.take());
        }
    }
    let _before = Before(UNITS.replace(Some(Rc::clone(units))));
    work()
}

/// Does `work` on each item by one thread; results are in the order of the items.
pub fn one_thread_each<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    parallel::map_within(items, |item| no_grad(|| work(item)))
}

/// The same rows where memory of their own would begin: at a boundary of 64 bytes. Rows of a model whose widths are multiples of 64 bytes
/// lie there already, and are not copied.
///
/// In small products MKL peels loops by where operands lie, which changes the order of sums. A unit in company begins where the one
/// before it ends, but one alone at a boundary.
fn aligned(rows: Tensor) -> Tensor {
    if is_aligned(&rows) { rows } else { rows.copy() }
}

fn is_aligned(rows: &Tensor) -> bool {
    rows.is_contiguous() && rows.data_ptr().addr().is_multiple_of(ALIGNMENT)
}

/// Has `work` write a tile of `output` at a boundary of 64 bytes, as [`aligned`] has it read there.
fn write_aligned(output: &Tensor, work: impl FnOnce(&Tensor)) {
    if is_aligned(output) {
        return work(output);
    }
    let own = output.empty_like();
    work(&own);
    output.shallow_clone().copy_(&own);
}

/// `x W` of rows that are a unit, or a tile of one, by the calling thread, whatever lies before them.
///
/// `x`: `[T, K]`; `weight`: `[K, O]`; `output`: `[T, O]`. For use within [`one_thread_each`].
pub fn multiply_alone(x: Tensor, weight: &Tensor, output: &Tensor) {
    let x = aligned(x);
    write_aligned(output, |output| drop(x.mm_out(output, weight)));
}

/// `x W^T + b`, tile by tile.
///
/// `x`: `[T, K]`, the rows of `units`; `weight`: `[O, K]`; `bias`: `[O]`. Returns `[T, O]`.
pub fn linear(units: &Units, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    // Tiles are cut within units, so that a unit's rows meet the same shapes in every pass: libtorch chooses the order of sums by shape.
    let output = output(x, weight.size()[0]);
    let items = units.tiles(TILE_ROWS).into_iter().map(|rows| {
        let parts = [x, &output].map(|whole| rows_of(whole, &rows));
        (parts, weight.tr(), bias.map(Tensor::shallow_clone))
    });
    one_thread_each(items.collect(), |([x, output], weight, bias)| match bias {
        Some(bias) => {
            let x = aligned(x);
            write_aligned(&output, |output| drop(bias.addmm_out(output, &x, &weight)));
        }
        None => multiply_alone(x, &weight, &output),
    });
    output
}

/// `x W`, tile by tile.
///
/// `x`: `[T, K]`, the rows of `units`; `weight`: `[K, O]`. Returns `[T, O]`.
pub fn matmul(units: &Units, x: &Tensor, weight: &Tensor) -> Tensor {
    let output = output(x, weight.size()[1]);
    let items = units.tiles(TILE_ROWS).into_iter().map(|rows| {
        let parts = [x, &output].map(|whole| rows_of(whole, &rows));
        (parts, weight.shallow_clone())
    });
    one_thread_each(items.collect(), |([x, output], weight)| multiply_alone(x, &weight, &output));
    output
}

/// `x W^T` of one unit with few rows and many columns, tile by tile.
///
/// `x`: `[T, K]`; `weight`: `[O, K]`. Returns `[T, O]`.
pub fn wide_linear(x: &Tensor, weight: &Tensor) -> Tensor {
    let columns = weight.size()[0];
    let (x, output) = (aligned(x.shallow_clone()), output(x, columns));
    let items = (0..columns).step_by(TILE_COLUMNS).map(|start| {
        let length = (TILE_COLUMNS as i64).min(columns - start);
        (x.shallow_clone(), weight.narrow(0, start, length).tr(), output.narrow(1, start, length))
    });
    one_thread_each(items.collect(), |(x, weight, output)| drop(x.mm_out(&output, &weight)));
    output
}

/// Adds the gradient of a matrix to sums that do not depend on their order: for each unit `gradient^T input`.
///
/// `sums`: `[O, K]` int64, contiguous; `gradient`: `[T, O]`; `input`: `[T, K]`.
///
/// # Errors
/// When the sums cannot be viewed.
pub fn add_weight_gradient(
    units: &Units,
    sums: &mut Tensor,
    gradient: &Tensor,
    input: &Tensor,
) -> Result<(), ViewError> {
    let width = sums.size()[1] as usize;
    let starts = (0..).step_by(TILE_ROWS);
    let of_units: Vec<[Tensor; 2]> =
        units.ranges.iter().map(|rows| [gradient, input].map(|whole| aligned(rows_of(whole, rows)))).collect();
    let items = i64_mut(sums)?.chunks_mut(TILE_ROWS * width).zip(starts).map(|(sums, start)| {
        let of_units = of_units.iter().map(|of_unit| of_unit.each_ref().map(Tensor::shallow_clone));
        (sums, start as i64, of_units.collect::<Vec<_>>())
    });
    // A tile of the sums stays in the cache over all units.
    let largest = one_thread_each(items.collect(), |(sums, start, of_units)| {
        let columns = (sums.len() / width) as i64;
        let of_unit = |[gradient, input]: &[Tensor; 2]| {
            // Per unit and then as integers: the product of all rows at once would round differently for every division into passes.
            let product = gradient.narrow(1, start, columns).tr().matmul(input);
            add_tensor(sums, &product)
        };
        of_units.iter().map(of_unit).collect::<Vec<f32>>()
    });
    note_units(units.ranges.len(), &largest);
    Ok(())
}

/// Adds the sum over all rows of each unit to sums that do not depend on their order.
///
/// `sums`: `[O]` int64, contiguous; `rows`: `[T, O]`.
///
/// # Errors
/// When the sums cannot be viewed.
pub fn add_column_sums(units: &Units, sums: &mut Tensor, rows: &Tensor) -> Result<(), ViewError> {
    let items = units.ranges.iter().map(|range| rows_of(rows, range)).collect();
    let of_units = one_thread_each(items, |rows: Tensor| rows.sum_dim_intlist(0, false, Kind::Float));
    let sums = i64_mut(sums)?;
    of_units.iter().for_each(|of_unit| note_bound(add_tensor(sums, of_unit)));
    Ok(())
}

/// Computes something of every tile of rows by one thread, and puts the results together.
///
/// `x`: `[T, ..]`, the rows of `units`; `work` gives as many rows as it gets.
pub fn by_rows<const N: usize>(units: &Units, x: &Tensor, work: impl Fn(Tensor) -> [Tensor; N] + Sync) -> [Tensor; N] {
    let items = units.tiles(TILE_ROWS).iter().map(|rows| rows_of(x, rows)).collect();
    let parts = one_thread_each(items, work);
    std::array::from_fn(|which| Tensor::cat(&parts.iter().map(|part| &part[which]).collect::<Vec<_>>(), 0))
}

/// Lengths of the parts that rows are cut into where a sum over them is rounded part by part: tiles of the units.
pub(crate) fn row_parts(units: &Units) -> Vec<usize> {
    units.tiles(TILE_ROWS).iter().map(Range::len).collect()
}

/// Notes the largest numbers that were added: for each unit the largest of all tiles.
fn note_units(units: usize, tiles: &[Vec<f32>]) {
    for unit in 0..units {
        note_bound(tiles.iter().fold(0.0, |largest, tile| tile[unit].max(largest)));
    }
}

fn add_tensor(sums: &mut [i64], values: &Tensor) -> f32 {
    let values = values.contiguous();
    match values.kind() {
        Kind::BFloat16 => add_exact(sums, <bf16 as Element>::slice(&values).expect("contiguous, of the host")),
        _ => add_exact(sums, <f32 as Element>::slice(&values).expect("contiguous float32, of the host")),
    }
}

fn output(x: &Tensor, columns: i64) -> Tensor {
    Tensor::empty([x.size()[0], columns], (x.kind(), x.device()))
}

fn rows_of(whole: &Tensor, rows: &Range<usize>) -> Tensor {
    whole.narrow(0, rows.start as i64, rows.len() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exact::exact_to_f32;
    use crate::testing::{difference, random};
    use crate::view::i64_ref;
    use tch::Device;

    const KINDS: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)];

    fn floats(sums: &Tensor) -> Tensor {
        let mut floats = vec![0.0; sums.numel()];
        exact_to_f32(i64_ref(sums).expect("host"), &mut floats);
        Tensor::from_slice(&floats).view_as(sums)
    }

    #[test]
    fn products_are_those_of_libtorch() {
        let units = Units::new(&[150, 1, 300]);
        for (kind, tolerance) in KINDS {
            let (x, bias) = (random(&[451, 70], kind), random(&[90], kind));
            let (weight, turned) = (random(&[90, 70], kind), random(&[70, 90], kind));
            let wide = random(&[5000, 70], kind);
            let close = |found: Tensor, expected: Tensor| {
                assert!(difference(&found, &expected) < tolerance, "{kind:?}: {}", difference(&found, &expected));
            };
            close(linear(&units, &x, &weight, Some(&bias)), x.linear(&weight, Some(&bias)));
            close(linear(&units, &x, &weight, None), x.linear(&weight, None::<&Tensor>));
            close(matmul(&units, &x, &turned), x.matmul(&turned));
            close(wide_linear(&x, &wide), x.linear(&wide, None::<&Tensor>));
            let gradient = random(&[451, 300], kind);
            let mut sums = Tensor::zeros([300, 70], (Kind::Int64, Device::Cpu));
            add_weight_gradient(&units, &mut sums, &gradient, &x).expect("host");
            close(floats(&sums), gradient.tr().matmul(&x));
            let mut sums = Tensor::zeros([300], (Kind::Int64, Device::Cpu));
            add_column_sums(&units, &mut sums, &gradient).expect("host");
            close(floats(&sums), gradient.sum_dim_intlist(0, false, Kind::Float));
            let [doubled, same] = by_rows(&units, &x, |x| [&x + &x, x]);
            assert!(doubled.equal(&(&x * 2.0)) && same.equal(&x));
        }
    }

    /// Products of few numbers, whose rows begin anywhere in memory.
    #[test]
    fn a_small_unit_is_bit_identical_alone_and_in_company() {
        for (kind, _) in KINDS {
            for (width, columns) in [(4, 12), (12, 8), (12, 5), (20, 40), (33, 7)] {
                let (x, gradient) = (random(&[60, width], kind), random(&[60, columns], kind));
                let (weight, bias) = (random(&[columns, width], kind), random(&[columns], kind));
                let sums = || Tensor::zeros([columns, width], (Kind::Int64, Device::Cpu));
                let run = |lengths: &[usize], [x, gradient]: [&Tensor; 2], sums: &mut Tensor| {
                    let units = Units::new(lengths);
                    add_weight_gradient(&units, sums, gradient, x).expect("host");
                    let back = matmul(&units, gradient, &weight);
                    Tensor::cat(&[linear(&units, x, &weight, Some(&bias)), linear(&units, x, &weight, None), back], 1)
                };
                let lengths = [1, 2, 3, 1, 7, 17, 29];
                let (mut start, mut alone, mut sum_alone, mut sum_together) = (0, Vec::new(), sums(), sums());
                for length in lengths {
                    let [x, gradient] = [&x, &gradient].map(|all| all.narrow(0, start, length as i64).copy());
                    alone.push(run(&[length], [&x, &gradient], &mut sum_alone));
                    start += length as i64;
                }
                let together = run(&lengths, [&x, &gradient], &mut sum_together);
                assert!(Tensor::cat(&alone, 0).equal(&together), "{kind:?}, {width} by {columns}");
                assert!(sum_alone.equal(&sum_together), "{kind:?}, {width} by {columns}");
            }
        }
    }

    /// Whatever the number of threads, and whatever company a unit has.
    #[test]
    fn a_unit_is_bit_identical_alone_and_in_company() {
        let threads = tch::get_num_threads();
        for (kind, _) in KINDS {
            let (x, gradient) = (random(&[600, 257], kind), random(&[600, 333], kind));
            let (weight, turned, wide) =
                (random(&[333, 257], kind), random(&[257, 333], kind), random(&[4500, 257], kind));
            let (mut alone, mut together) = (Vec::new(), Vec::new());
            let sums = || Tensor::zeros([333, 257], (Kind::Int64, Device::Cpu));
            let (mut sum_alone, mut sum_together) = (sums(), sums());
            for (start, length) in [(0, 37), (37, 400), (437, 163)] {
                let unit = Units::new(&[length as usize]);
                let [x, gradient] = [&x, &gradient].map(|all| all.narrow(0, start, length).copy());
                tch::set_num_threads(1 + start as i32 % 4);
                alone.push([linear(&unit, &x, &weight, None), matmul(&unit, &x, &turned), wide_linear(&x, &wide)]);
                add_weight_gradient(&unit, &mut sum_alone, &gradient, &x).expect("host");
            }
            tch::set_num_threads(3);
            let units = Units::new(&[37, 400, 163]);
            together.push(linear(&units, &x, &weight, None));
            together.push(matmul(&units, &x, &turned));
            add_weight_gradient(&units, &mut sum_together, &gradient, &x).expect("host");
            for (which, together) in together.iter().enumerate() {
                let alone = Tensor::cat(&alone.iter().map(|parts| &parts[which]).collect::<Vec<_>>(), 0);
                assert!(alone.equal(together), "{kind:?}, product {which}");
            }
            assert!(sum_alone.equal(&sum_together), "{kind:?}");
            for (unit, alone) in units.ranges().iter().zip(&alone) {
                assert!(wide_linear(&rows_of(&x, unit).copy(), &wide).equal(&alone[2]), "{kind:?}");
            }
        }
        tch::set_num_threads(threads);
    }
}
