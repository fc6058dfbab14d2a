package lab

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const notes = `
name: notes
services:
  keep:
    image: oci:img
    volumes: [data:/data]
    healthcheck: {test: [CMD, /server, health], interval: 2s}
volumes:
  data:
    x-holdfast: {size: 64MiB}
x-holdfast:
  routes: [{host: notes.localhost, service: keep, port: 8080}]
`

const savedMarker = "marker-saved-b7d2f6"

// saved waits until what a workload's volumes have now outlives its node.
func (l *Lab) saved(name string) {
	l.T.Helper()
	now := time.Now()
	l.Until("a snapshot of "+name, func() bool {
		w := l.Workload(name)
		return w.Saved != nil && w.Saved.After(now)
	})
}

// volumeFollows loses the nodes of a workload with a volume one after another. The data is where the workload is, each time,
// and on no machine in the clear.
func volumeFollows(t *testing.T, l *Lab) {
	l.Deploy("notes", notes)
	write := func(name, text string) {
		t.Helper()
		if out, err := l.Curl("notes.localhost", "/file?path=/data/"+name, "--data-binary", text); err != nil {
			t.Fatalf("write: %v %s", err, out)
		}
	}
	read := func(name string) string { return l.Get("notes.localhost", "/file?path=/data/"+name) }
	write("first", savedMarker)
	l.saved("notes/keep-0")
	was := l.Workload("notes/keep-0")
	volumes := func(node string) int {
		all, err := filepath.Glob(filepath.Join(l.Dir, "data", node, "volumes", "*.img"))
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	images := volumes(was.Node)
	for _, machine := range []string{"node-1", "node-2", "node-3", "location-1", "location-2", "location-3", "validator"} {
		if found, err := Search(filepath.Join(l.Dir, "data", machine), savedMarker); err != nil || len(found) > 0 {
			t.Errorf("%s shows what is in a volume: %v %v", machine, found, err)
		}
	}
	elsewhere := func(node string, epoch uint64) func() bool {
		return func() bool {
			w := l.Workload("notes/keep-0")
			return w.Node != node && w.Epoch > epoch && read("first") == savedMarker
		}
	}
	l.Run("lab", "kill", was.Node)
	l.Until("the volume on another node", elsewhere(was.Node, was.Epoch))
	write("second", "later")
	l.saved("notes/keep-0")
	l.Run("lab", "resume", was.Node)
	l.Until("the end of the image that was left behind", func() bool { return volumes(was.Node) == images-1 })

	// A node that only sleeps wakes up with the volume and the keys of its store. It serves nothing, and saves nothing over
	// what has been written since.
	was = l.Workload("notes/keep-0")
	l.Run("lab", "pause", was.Node)
	l.Until("the volume away from a node that sleeps", elsewhere(was.Node, was.Epoch))
	if got := read("second"); got != "later" {
		t.Errorf("what was written after the first move: %q", got)
	}
	write("third", "last")
	l.Run("lab", "resume", was.Node)
	l.Until("the node that slept", func() bool {
		s, err := l.Status()
		return err == nil && slices.ContainsFunc(s.Nodes, func(n Node) bool { return n.Name == was.Node && n.State == "up" })
	})
	l.saved("notes/keep-0")
	l.saved("notes/keep-0") // it has had the time
	now := l.Workload("notes/keep-0")
	if now.Node == was.Node || now.Unsaved != "" {
		t.Errorf("after a late node: %+v", now)
	}
	l.Run("lab", "kill", now.Node)
	l.Until("the third move", elsewhere(now.Node, now.Epoch))
	if got := read("third"); got != "last" {
		t.Errorf("what was written while a late node was there: %q", got)
	}
	l.Run("lab", "resume", now.Node)
	l.saved("notes/keep-0")
	l.putBack(t, read, write)
	l.Run("contract", "cancel", "notes", "--yes")
}

// putBack has the owner put the volume back to a snapshot, and then to what it was before he did that.
func (l *Lab) putBack(t *testing.T, read func(string) string, write func(string, string)) {
	type snapshot struct {
		Sequence uint64
		Time     time.Time
	}
	list := func() (all []snapshot) {
		out, err := l.Try("volume", "snapshots", "notes/data", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &all)
		}
		if err != nil || len(all) == 0 {
			return nil
		}
		return all
	}
	before := list()
	if before == nil {
		t.Fatal("no snapshots are shown")
	}
	write("third", "by mistake")
	l.saved("notes/keep-0")
	was := l.Workload("notes/keep-0")
	if out := l.Run("volume", "restore", "notes/data", fmt.Sprint(before[0].Sequence), "--dry-run"); !strings.Contains(out, "notes/data is put back to what it was at ") {
		t.Errorf("dry run: %s", out)
	}
	if _, err := l.Try("volume", "restore", "notes/data", "999999", "--yes"); err == nil || !strings.Contains(err.Error(), "is not kept") {
		t.Errorf("a snapshot that there is not: %v", err)
	}
	l.Run("volume", "restore", "notes/data", fmt.Sprint(before[0].Sequence), "--yes")
	l.Until("what it was", func() bool { return read("third") == "last" && l.Workload("notes/keep-0").Epoch > was.Epoch })
	l.saved("notes/keep-0")
	after := list()
	i := slices.IndexFunc(after, func(s snapshot) bool {
		return s.Time.Before(time.Now()) && s.Sequence > before[0].Sequence && s.Sequence < after[0].Sequence
	})
	if i < 0 {
		t.Fatalf("before %v, after %v", before, after)
	}
	l.Run("volume", "restore", "notes/data", fmt.Sprint(after[i].Sequence), "--yes")
	l.Until("the mistake", func() bool { return read("third") == "by mistake" })
	if out := l.Run("volume", "list"); !strings.Contains(out, "notes/data") || !strings.Contains(out, " ago") {
		t.Errorf("volume list: %s", out)
	}
}

// ledgerRows is PostgreSQL under a writer that notes what was acknowledged, and an auditor. These two stay where they are.
const ledgerRows = `
name: rows
services:
  db:
    image: oci:postgres
    environment: {POSTGRES_USER: app, POSTGRES_DB: app, POSTGRES_PASSWORD_FILE: /run/secrets/pw}
    secrets: [pw]
    volumes: [data:/var/lib/postgresql/data]
    healthcheck: {test: [CMD, pg_isready, -h, "::1", -U, app, -d, app], interval: 2s, start_period: 60s}
    deploy: {resources: {limits: {cpus: "1", memory: 512M}}}
    x-holdfast: {placement: {nodes: [node-1, node-2]}}
  writer: &client
    image: oci:postgres
    user: "100:102"
    entrypoint: [psql, -h, db, -U, app, -d, app, -At, -v, ON_ERROR_STOP=1, -f, /sql]
    environment: {PGPASSWORD: marker-pw, PGCONNECT_TIMEOUT: "3", PGOPTIONS: "-c client_min_messages=error"}
    configs: [{source: write, target: /sql}]
    restart: always
    x-holdfast: {placement: {nodes: [node-3]}}
  audit:
    <<: *client
    configs: [{source: audit, target: /sql}]
configs:
  write: {content: "create table if not exists entries (i bigserial primary key, at timestamptz, pad text);\ninsert into entries (at, pad) values (clock_timestamp(), repeat('x', 500)) returning 'ack', i, (extract(epoch from at) * 1000)::bigint\n\\watch 0.02\n"}
  audit: {content: "create extension if not exists amcheck;\nselect 'rows', (extract(epoch from clock_timestamp()) * 1000)::bigint, string_agg(a || '-' || b, ',' order by a) from (select min(i) a, max(i) b from (select i, i - row_number() over (order by i) g from entries) x group by g) y union all select 'bad', count(*), '' from verify_heapam('entries') union all select 'checked', 0, bt_index_parent_check('entries_pkey', true, true)::text\n\\watch 1\n"}
secrets:
  pw: {file: pgpw}
volumes:
  data:
    x-holdfast: {size: 1GiB}
`

// acked are the rows that the writer was told of, with the times that the database gave them.
func acked(log string) map[int64]int64 {
	out := map[int64]int64{}
	for _, m := range regexp.MustCompile(`(?m)^ack\|(\d+)\|(\d+)$`).FindAllStringSubmatch(log, -1) {
		i, _ := strconv.ParseInt(m[1], 10, 64)
		at, _ := strconv.ParseInt(m[2], 10, 64)
		out[i] = at
	}
	return out
}

// audited is what the newest audit after a moment found: the rows, and whether heap and index are sound.
func audited(log string, after time.Time) (rows func(int64) bool, sound bool, ok bool) {
	all := regexp.MustCompile(`(?m)^rows\|(\d+)\|([\d,-]*)\nbad\|(\d+)\|\nchecked\|0\|$`).FindAllStringSubmatch(log, -1)
	if len(all) == 0 {
		return nil, false, false
	}
	m := all[len(all)-1]
	if at, _ := strconv.ParseInt(m[1], 10, 64); at < after.UnixMilli() {
		return nil, false, false
	}
	var runs [][2]int64
	for _, r := range strings.Split(m[2], ",") {
		var run [2]int64
		fmt.Sscanf(r, "%d-%d", &run[0], &run[1])
		runs = append(runs, run)
	}
	return func(i int64) bool {
		return slices.ContainsFunc(runs, func(r [2]int64) bool { return r[0] <= i && i <= r[1] })
	}, m[3] == "0", true
}

// PostgreSQL loses its node at any moment of a write load. What status said would be lost is all that may be lost, and what comes
// back is a sound database.
func TestPostgresOutlivesItsNodes(t *testing.T) {
	if testing.Short() {
		t.Skip("a whole grid takes minutes")
	}
	kills := 5
	if os.Getenv("HOLDFAST_LONG") != "" {
		kills = 200
	}
	l := New(t)
	layout, err := filepath.Abs("../../examples/images/out/postgres")
	if err == nil {
		err = os.Symlink(layout, filepath.Join(l.App, "postgres"))
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(l.App, "pgpw"), []byte("marker-pw"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Deploy("rows", ledgerRows)
	stamps := regexp.MustCompile(`(?m)^\S+Z `)
	log := func(service string) string {
		return stamps.ReplaceAllString(l.Run("logs", "rows", service, "--tail", "100000"), "")
	}
	l.saved("rows/db-0")
	given := map[int64]int64{} // up as lost already; their numbers come again
	lost, worst := 0, time.Duration(0)
	for n := range kills {
		time.Sleep(time.Duration(rand.Int64N(int64(15 * time.Second))))
		w := l.Workload("rows/db-0")
		if w.Saved == nil {
			t.Fatalf("kill %d: it is not saved: %+v", n, w)
		}
		before := acked(log("writer"))
		l.Run("lab", "kill", w.Node)
		began := time.Now()
		l.Within(2*time.Minute, "the next audit", func() bool {
			_, _, ok := audited(log("audit"), began.Add(5*time.Second))
			return ok
		})
		took := time.Since(began)
		rows, sound, _ := audited(log("audit"), began.Add(5*time.Second))
		if !sound {
			t.Errorf("kill %d: the heap is damaged", n)
		}
		gone := 0
		for i, at := range before {
			if rows(i) || given[i] == at {
				continue
			}
			gone++
			given[i] = at
			if at < w.Saved.UnixMilli() {
				t.Errorf("kill %d: row %d of %v is lost, and was safe since %v", n, i, time.UnixMilli(at), w.Saved)
			}
		}
		if len(before) == 0 {
			t.Errorf("kill %d: nothing was written", n)
		}
		lost, worst = lost+gone, max(worst, began.Sub(*w.Saved))
		t.Logf("kill %d: %d rows acknowledged, %d lost, of at most %v; audited after %v", n, len(before), gone, began.Sub(*w.Saved).Round(time.Millisecond), took.Round(time.Millisecond))
		l.Run("lab", "resume", w.Node)
		l.Within(2*time.Minute, "the node and a snapshot", func() bool {
			s, err := l.Status()
			return err == nil && !slices.ContainsFunc(s.Nodes, func(n Node) bool { return n.State != "up" }) && l.Workload("rows/db-0").Saved != nil
		})
	}
	t.Logf("%d kills: %d rows lost, the widest window %v", kills, lost, worst.Round(time.Millisecond))
}
