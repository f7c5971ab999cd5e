(** The composition theorem, with degrees, over any commutative ring.

    A network is a straight-line program: leaves, and operators with a *pseudo*-Jacobian (the edited
    backward pass) and biases. Value k has a degree [deg k]. Where every operator is consistent with
    the degrees of what it reads and its own, reverse mode hands  deg out * <c, v_out>  to the leaves
    and biases, for every cotangent c: at degree 1 that is FullGrad-completeness. Any shape, any
    size, fan-out and repeated arguments included; no axioms (Audit.v). *)
From Coq Require Import List Arith Lia Ring_theory Ring Bool.
Import ListNotations.

Section Composition.

Variable A : Type.
Variables (rO rI : A) (radd rmul rsub : A -> A -> A) (ropp : A -> A).
Variable Ath : ring_theory rO rI radd rmul rsub ropp (@eq A).
Add Ring Aring : Ath.

Declare Scope A_scope.
Delimit Scope A_scope with A.
Local Infix "+" := radd : A_scope.
Local Infix "*" := rmul : A_scope.
Local Open Scope A_scope.

(** ** Finite sums *)
Definition vec := nat -> A.

Fixpoint sum (n : nat) (f : nat -> A) : A :=
  match n with O => rO | S k => sum k f + f k end.

Definition dot (n : nat) (u v : vec) : A := sum n (fun i => u i * v i).

Lemma sum_ext n f g : (forall i, i < n -> f i = g i) -> sum n f = sum n g.
Proof. induction n; intros H; simpl; auto. rewrite IHn, (H n); auto. Qed.

Lemma sum_zero n f : (forall i, i < n -> f i = rO) -> sum n f = rO.
Proof. induction n; intros H; simpl; auto. rewrite IHn, (H n); auto. ring. Qed.

Lemma sum_add n f g : sum n (fun i => f i + g i) = sum n f + sum n g.
Proof. induction n; simpl; [ring | rewrite IHn; ring]. Qed.

Lemma sum_mul_l n c f : sum n (fun i => c * f i) = c * sum n f.
Proof. induction n; simpl; [ring | rewrite IHn; ring]. Qed.

Lemma sum_mul_r n c f : sum n (fun i => f i * c) = sum n f * c.
Proof. induction n; simpl; [ring | rewrite IHn; ring]. Qed.

Lemma sum_swap n m (f : nat -> nat -> A) :
  sum n (fun i => sum m (fun j => f i j)) = sum m (fun j => sum n (fun i => f i j)).
Proof.
  induction n; simpl.
  - symmetry; apply sum_zero; auto.
  - rewrite IHn, <- sum_add. reflexivity.
Qed.

Lemma sum_pick n p f : p < n -> sum n (fun j => if Nat.eqb p j then f j else rO) = f p.
Proof.
  induction n; intros H; [lia|]. simpl.
  destruct (Nat.eqb_spec p n) as [->|Hne].
  - rewrite (sum_zero n); [ring|]. intros i Hi.
    destruct (Nat.eqb_spec n i); [lia|auto].
  - rewrite IHn by lia. ring.
Qed.

(** ** Local operators and local completeness *)

(** A local operator with a *pseudo*-Jacobian (the modified backward pass):
    [arity] vector arguments of sizes [din a], an output of size [dout], and a
    bias vector of size [nb].  [J u a i l] is the entry of the pseudo-Jacobian of
    output coordinate [i] with respect to coordinate [l] of argument [a], at the
    point [u]; [JB u i l] the same with respect to the bias. *)
Record op := Op {
  arity : nat;
  din   : nat -> nat;
  dout  : nat;
  nb    : nat;
  bias  : vec;
  fwd   : (nat -> vec) -> vec;
  J     : (nat -> vec) -> nat -> nat -> nat -> A;
  JB    : (nat -> vec) -> nat -> nat -> A }.

(** [e a]: the degree of what argument [a] reads; [d]: the degree of the result. *)
Definition consistent_at (o : op) (e : nat -> A) (d : A) (u : nat -> vec) : Prop :=
  forall i, i < dout o ->
    d * fwd o u i
    = sum (arity o) (fun a => e a * sum (din o a) (fun l => J o u a i l * u a l))
      + sum (nb o) (fun l => JB o u i l * bias o l).

(** Complete is consistent with every degree 1. *)
Definition complete_at (o : op) (u : nat -> vec) : Prop :=
  forall i, i < dout o ->
    fwd o u i = sum (arity o) (fun a => sum (din o a) (fun l => J o u a i l * u a l))
              + sum (nb o) (fun l => JB o u i l * bias o l).

Definition complete (o : op) : Prop := forall u, complete_at o u.

Lemma complete_is_consistent o u : complete_at o u <-> consistent_at o (fun _ => rI) rI u.
Proof.
  split; intros H i Hi; specialize (H i Hi).
  - rewrite (sum_ext (arity o) (fun a => rI * _)
      (fun a => sum (din o a) (fun l => J o u a i l * u a l))) by (intros; ring).
    rewrite <- H. ring.
  - rewrite (sum_ext (arity o) (fun a => rI * _)
      (fun a => sum (din o a) (fun l => J o u a i l * u a l))) in H by (intros; ring).
    rewrite <- H. ring.
Qed.

(** ** Straight-line programs (feed-forward DAGs in topological order) *)
Inductive instr :=
| Leaf (d : nat) (x : vec)
| App  (o : op) (args : nat -> nat).

Definition idim (c : instr) := match c with Leaf d _ => d | App o _ => dout o end.
Definition dflt := Leaf 0 (fun _ => rO).
Definition at_ (P : list instr) k := nth k P dflt.
Definition dim P k := idim (at_ P k).

Definition wf (P : list instr) : Prop :=
  forall k o args, k < length P -> at_ P k = App o args ->
    forall a, a < arity o -> args a < k /\ din o a = dim P (args a).

(** Forward evaluation of the first [n] instructions. *)
Fixpoint run (P : list instr) (n : nat) : nat -> vec :=
  match n with
  | O => fun _ _ => rO
  | S k => fun j =>
      if Nat.eqb j k
      then match at_ P k with
           | Leaf _ x => x
           | App o args => fwd o (fun a => run P k (args a))
           end
      else run P k j
  end.

Definition point P k (args : nat -> nat) : nat -> vec := fun a => run P k (args a).

(** One step of reverse accumulation at instruction [k]. *)
Definition step (P : list instr) (k : nat) (cot : nat -> vec) : nat -> vec :=
  match at_ P k with
  | Leaf _ _ => cot
  | App o args => fun j l =>
      cot j l + sum (arity o) (fun a =>
        if Nat.eqb (args a) j
        then sum (dout o) (fun i => cot k i * J o (point P k args) a i l)
        else rO)
  end.

(** Process instructions k-1, k-2, ..., 0. *)
Fixpoint rev_sweep (P : list instr) (k : nat) (cot : nat -> vec) : nat -> vec :=
  match k with O => cot | S k' => rev_sweep P k' (step P k' cot) end.

Definition seed (out : nat) (c : vec) : nat -> vec :=
  fun j l => if Nat.eqb out j then c l else rO.

Definition backprop P out c := rev_sweep P (length P) (seed out c).

(** Contribution of instruction [k] to the attribution: <cotangent, leaf value>
    for a leaf, <JB^T cotangent, bias> for an operator. *)
Definition contrib (P : list instr) (g : nat -> vec) (k : nat) : A :=
  match at_ P k with
  | Leaf d x => dot d (g k) x
  | App o args =>
      dot (nb o) (fun l => sum (dout o) (fun i => g k i * JB o (point P k args) i l)) (bias o)
  end.

(** Every operator is consistent with the degrees of the values that it reads, and its own. *)
Definition all_consistent (P : list instr) (deg : nat -> A) : Prop :=
  forall k, k < length P ->
    match at_ P k with
    | Leaf _ _ => deg k = rI
    | App o args => consistent_at o (fun a => deg (args a)) (deg k) (point P k args)
    end.

(** [w] is a forward tangent of the edited network: anything on the leaves, and behind an operator
    what its pseudo-Jacobians make of the tangents that it reads, its biases moving by themselves. *)
Definition tangent (P : list instr) (w : nat -> vec) : Prop :=
  forall k o args, k < length P -> at_ P k = App o args -> forall i, i < dout o ->
    w k i = sum (arity o) (fun a => sum (din o a) (fun l => J o (point P k args) a i l * w (args a) l))
            + sum (nb o) (fun l => JB o (point P k args) i l * bias o l).

(** What reverse mode gives value [k], where the leaves move by [w]. *)
Definition received (P : list instr) (w : nat -> vec) (g : nat -> vec) (k : nat) : A :=
  match at_ P k with
  | Leaf d _ => dot d (g k) (w k)
  | App o args => contrib P g k
  end.

(** ** Proof *)
Lemma run_stable P n j : j < n -> run P n j = run P (S j) j.
Proof.
  induction n; intros H; [lia|].
  destruct (Nat.eq_dec j n) as [->|Hne]; [reflexivity|].
  rewrite <- IHn by lia. simpl. destruct (Nat.eqb_spec j n); [lia|reflexivity].
Qed.

Lemma run_at P n j : j < n ->
  run P n j = match at_ P j with
              | Leaf _ x => x
              | App o args => fwd o (point P j args) end.
Proof. intros H. rewrite run_stable by auto. simpl. now rewrite Nat.eqb_refl. Qed.

Lemma step_above P k cot j l : wf P -> k < length P -> k <= j -> step P k cot j l = cot j l.
Proof.
  intros Hwf Hk Hj. unfold step. destruct (at_ P k) as [d x|o args] eqn:E; auto.
  rewrite sum_zero; [ring|]. intros a Ha. destruct (Hwf k o args Hk E a Ha) as [Hlt _].
  destruct (Nat.eqb_spec (args a) j); [lia|auto].
Qed.

Lemma sweep_above P k cot j l :
  wf P -> k <= length P -> k <= j -> rev_sweep P k cot j l = cot j l.
Proof.
  revert cot. induction k; intros cot Hwf Hk Hj; simpl; auto.
  rewrite IHk by (auto; lia). apply step_above; auto; lia.
Qed.

(** ** Reverse mode is the transpose of the forward tangent *)
Definition carried P (w : nat -> vec) k (cot : nat -> vec) :=
  sum k (fun j => dot (dim P j) (cot j) (w j)).

Definition through o (g : vec) (u : nat -> vec) : A :=
  dot (nb o) (fun l => sum (dout o) (fun i => g i * JB o u i l)) (bias o).

(** One node: what it is carried at goes to its operands and its biases. *)
Lemma node_carries o (v : vec) (t : nat -> vec) u (g : vec) :
  (forall i, i < dout o ->
    v i = sum (arity o) (fun a => sum (din o a) (fun l => J o u a i l * t a l))
          + sum (nb o) (fun l => JB o u i l * bias o l)) ->
  dot (dout o) g v
  = sum (arity o) (fun a => sum (din o a) (fun l =>
      sum (dout o) (fun i => g i * J o u a i l) * t a l))
    + through o g u.
Proof.
  intros H. unfold through, dot.
  rewrite (sum_ext (dout o) (fun i => g i * v i) (fun i =>
      sum (arity o) (fun a => sum (din o a) (fun l => g i * J o u a i l * t a l))
      + sum (nb o) (fun l => g i * JB o u i l * bias o l))).
  - rewrite sum_add. f_equal.
    + rewrite sum_swap. apply sum_ext; intros a Ha. rewrite sum_swap.
      apply sum_ext; intros l Hl. now rewrite sum_mul_r.
    + rewrite sum_swap. apply sum_ext; intros l Hl. now rewrite sum_mul_r.
  - intros i Hi. rewrite (H i Hi).
    transitivity (g i * sum (arity o) (fun a => sum (din o a) (fun l => J o u a i l * t a l))
      + g i * sum (nb o) (fun l => JB o u i l * bias o l)); [ring|].
    f_equal.
    + rewrite <- sum_mul_l. apply sum_ext; intros a Ha. rewrite <- sum_mul_l.
      apply sum_ext; intros; ring.
    + rewrite <- sum_mul_l. apply sum_ext; intros; ring.
Qed.

(** A step of the sweep hands what arrives at each argument to the value that it reads. *)
Lemma step_carries P w k o args cot :
  wf P -> k < length P -> at_ P k = App o args ->
  carried P w k (step P k cot)
  = carried P w k cot
    + sum (arity o) (fun a => sum (din o a) (fun l =>
        sum (dout o) (fun i => cot k i * J o (point P k args) a i l) * w (args a) l)).
Proof.
  intros Hwf Hk E. unfold carried.
  transitivity (sum k (fun j => dot (dim P j) (cot j) (w j)
     + sum (arity o) (fun a => if Nat.eqb (args a) j then
         sum (dim P j) (fun l => sum (dout o) (fun i =>
           cot k i * J o (point P k args) a i l) * w j l) else rO))).
  - apply sum_ext; intros j Hj. unfold dot, step. rewrite E.
    rewrite (sum_ext _ _ (fun l => cot j l * w j l +
       sum (arity o) (fun a => (if Nat.eqb (args a) j
         then sum (dout o) (fun i => cot k i * J o (point P k args) a i l) * w j l
         else rO)))).
    + rewrite sum_add, sum_swap. f_equal. apply sum_ext; intros a Ha.
      destruct (Nat.eqb (args a) j); auto. now apply sum_zero.
    + intros l Hl.
      rewrite (sum_ext (arity o)
         (fun a => if Nat.eqb (args a) j
            then sum (dout o) (fun i => cot k i * J o (point P k args) a i l) * w j l
            else rO)
         (fun a => (if Nat.eqb (args a) j
            then sum (dout o) (fun i => cot k i * J o (point P k args) a i l)
            else rO) * w j l)).
      * rewrite sum_mul_r. ring.
      * intros a Ha. destruct (Nat.eqb (args a) j); ring.
  - rewrite sum_add. f_equal. rewrite sum_swap. apply sum_ext; intros a Ha.
    destruct (Hwf k o args Hk E a Ha) as [Hlt Hd].
    rewrite (sum_pick k (args a) (fun j => sum (dim P j) (fun l => sum (dout o) (fun i =>
       cot k i * J o (point P k args) a i l) * w j l))) by auto.
    now rewrite Hd.
Qed.

Lemma contrib_ext P g g' k : (forall l, g k l = g' k l) -> contrib P g k = contrib P g' k.
Proof.
  intros H. unfold contrib, dot. destruct (at_ P k); apply sum_ext; intros i Hi.
  - now rewrite H.
  - f_equal. apply sum_ext; intros. now rewrite H.
Qed.

(** At every cut: what is carried across it is what is received below. *)
Lemma sweep_invariant P w k cot :
  wf P -> tangent P w -> k <= length P ->
  carried P w k cot = sum k (received P w (rev_sweep P k cot)).
Proof.
  intros Hwf Ht. revert cot. induction k; intros cot Hk; [reflexivity|].
  assert (Hs : forall l, rev_sweep P (S k) cot k l = cot k l).
  { intros l. simpl. rewrite sweep_above by (auto; lia). apply step_above; auto; lia. }
  assert (Hr : received P w (rev_sweep P (S k) cot) k
               = match at_ P k with
                 | Leaf d _ => dot d (cot k) (w k)
                 | App o args => through o (cot k) (point P k args)
                 end).
  { unfold received. destruct (at_ P k) as [d x|o args] eqn:E.
    - unfold dot. apply sum_ext; intros l Hl. now rewrite Hs.
    - rewrite (contrib_ext P _ cot _ Hs). unfold contrib. now rewrite E. }
  change (carried P w (S k) cot) with (carried P w k cot + dot (dim P k) (cot k) (w k)).
  change (sum (S k) (received P w (rev_sweep P (S k) cot)))
    with (sum k (received P w (rev_sweep P k (step P k cot)))
          + received P w (rev_sweep P (S k) cot) k).
  rewrite Hr, <- IHk by lia. destruct (at_ P k) as [d x|o args] eqn:E.
  - replace (step P k cot) with cot by (unfold step; now rewrite E).
    unfold dim. now rewrite E.
  - rewrite (step_carries P w k o args) by (auto; lia). unfold dim. rewrite E. simpl idim.
    rewrite (node_carries o (w k) (fun a => w (args a)) (point P k args)) by (apply Ht; auto; lia).
    ring.
Qed.

Theorem reverse_is_transpose : forall P w out c,
  wf P -> tangent P w -> out < length P ->
  dot (dim P out) c (w out) = sum (length P) (received P w (backprop P out c)).
Proof.
  intros P w out c Hwf Ht Hout. unfold backprop. rewrite <- sweep_invariant by auto.
  unfold carried, seed, dot.
  rewrite (sum_ext (length P) _ (fun j => if Nat.eqb out j
      then sum (dim P j) (fun l => c l * w j l) else rO)).
  - now rewrite (sum_pick (length P) out (fun j => sum (dim P j) (fun l => c l * w j l))).
  - intros j Hj. destruct (Nat.eqb out j); auto. apply sum_zero. intros; ring.
Qed.

(** ** The theorem *)
(** With consistent operators, deg * value is a tangent: forward mode that starts with the values of
    the leaves arrives at each value times its degree, element by element. *)
Lemma scaled_values_are_tangents P deg :
  wf P -> all_consistent P deg -> tangent P (fun j l => deg j * run P (length P) j l).
Proof.
  intros Hwf HC k o args Hk E i Hi. pose proof (HC k Hk) as Hc. rewrite E in Hc.
  rewrite run_at, E by auto. rewrite (Hc i Hi). f_equal.
  apply sum_ext; intros a Ha. rewrite <- sum_mul_l. apply sum_ext; intros l Hl.
  destruct (Hwf k o args Hk E a Ha) as [Hlt _]. unfold point.
  rewrite (run_stable P (length P) (args a)), (run_stable P k (args a)) by lia. ring.
Qed.

Theorem composition : forall (P : list instr) (deg : nat -> A) (out : nat) (c : vec),
  wf P -> all_consistent P deg -> out < length P ->
  deg out * dot (dim P out) c (run P (length P) out)
  = sum (length P) (contrib P (backprop P out c)).
Proof.
  intros P deg out c Hwf HC Hout.
  pose proof (reverse_is_transpose P _ out c Hwf (scaled_values_are_tangents P deg Hwf HC) Hout) as H.
  transitivity (dot (dim P out) c (fun l => deg out * run P (length P) out l)).
  - unfold dot. rewrite <- sum_mul_l. apply sum_ext; intros; ring.
  - rewrite H. apply sum_ext; intros k Hk. unfold received.
    pose proof (HC k Hk) as Hc. destruct (at_ P k) as [d x|o args] eqn:E; auto.
    unfold contrib. rewrite E. unfold dot. apply sum_ext; intros l Hl.
    rewrite Hc, run_at, E by auto. ring.
Qed.

(** FullGrad-completeness of value [out]: for every cotangent, <c, v> is what reverse mode gives
    the leaves and the biases. *)
Definition fullgrad_complete (P : list instr) (out : nat) : Prop :=
  forall c, dot (dim P out) c (run P (length P) out)
            = sum (length P) (contrib P (backprop P out c)).

Corollary fullgrad_completeness P deg out :
  wf P -> all_consistent P deg -> out < length P -> deg out = rI -> fullgrad_complete P out.
Proof.
  intros Hwf HC Hout Hd c. rewrite <- (composition P deg) by auto. rewrite Hd. ring.
Qed.

End Composition.
